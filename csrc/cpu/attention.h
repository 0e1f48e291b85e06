// attention over float keys and values of one head, for a tile of queries that share it:
//
//     out[q] = Σ_s softmax_s(scaling · query[q] · key[s] + mask[q, s]) · value[s],  s < visible[q]
//
// Queries lie in lanes, so that everything between the two products is elementwise, and keys and
// values are read as they lie in the cache, float by float:
//
//                    d = 0 … D       lanes: 2 registers of queries         keys
//     key[s]   [ broadcast, row ] ×  queries turned, [D, lanes]       =  scores [kKeys, lanes]
//     value[s] [ broadcast, row ]ᵀ × weights [kKeys, lanes]           =  out, [D, lanes]
//
// A block of kKeys keys at a time, with the running maximum and sum of each lane (Milakov and
// Gimelshein, arXiv:1805.02867); block, queries and scores stay in the first-level cache (44 KiB at
// D = 64). Bound by multiply-adds: two registers times a broadcast each, 2 · 12 sums with AVX-512.
//
// By sampling, a prefill of 512 tokens of SmolLM2 spends 70 ms here on an Emerald Rapids core,
// where torch's flash attention took 166.
//
// For few queries (a decoded token) lanes hold D instead, and reading the keys is what bounds it.
#pragma once

#include "kernels.h"
#include "vector.h"

namespace llmq {
namespace {

using V = Vector;

constexpr int64_t kKeys = 96;                             // of a block: 8 · 12 and 16 · 6
constexpr int64_t kLanes = 2 * kWidth;                    // queries of a tile
constexpr int kTall = Vector::kRegisters == 32 ? 12 : 6;  // keys of a tile of scores
constexpr int kDims = Vector::kRegisters == 32 ? 8 : 4;   // dimensions of a tile of outputs
constexpr float kHidden = -1e30f;  // the score of a key that a query must not see
static_assert(kAttentionLanes >= kLanes && kAttentionKeys >= kKeys + kWidth);

// scores[s, lane] = key[s] · query[lane], T keys; kStride is the keys' stride where it is known.
template <int T, int64_t kStride>
void score(const float* key, int64_t stride, const float* queries, int64_t D, float* scores) {
  const int64_t step = kStride == 0 ? stride : kStride;
  Register sum[T][2];
#pragma GCC unroll 12
  for (int t = 0; t < T; ++t) sum[t][0] = sum[t][1] = V::set(0.0f);
  for (int64_t d = 0; d < D; ++d) {
    const Register a = V::load(queries + d * kLanes), b = V::load(queries + d * kLanes + kWidth);
#pragma GCC unroll 12
    for (int t = 0; t < T; ++t) {
      const Register k = V::set(key[t * step + d]);
      sum[t][0] = V::fma(k, a, sum[t][0]);
      sum[t][1] = V::fma(k, b, sum[t][1]);
    }
  }
#pragma GCC unroll 12
  for (int t = 0; t < T; ++t) {
    V::store(scores + t * kLanes, sum[t][0]);
    V::store(scores + t * kLanes + kWidth, sum[t][1]);
  }
}

using Score = void(const float*, int64_t, const float*, int64_t, float*);
template <int64_t kStride, int T>
constexpr Score* kScore = score<(T < kTall ? T : kTall), kStride>;
template <int64_t kStride>
constexpr Score* kScores[] = {nullptr,
                              kScore<kStride, 1>,
                              kScore<kStride, 2>,
                              kScore<kStride, 3>,
                              kScore<kStride, 4>,
                              kScore<kStride, 5>,
                              kScore<kStride, 6>,
                              kScore<kStride, 7>,
                              kScore<kStride, 8>,
                              kScore<kStride, 9>,
                              kScore<kStride, 10>,
                              kScore<kStride, 11>,
                              kScore<kStride, 12>};

template <int64_t kStride>
void score_block(const AttentionTile& c, int64_t s, int64_t count, float* scores) {
  for (int64_t at = 0; at < count; at += kTall) {
    const int64_t keys = count - at < kTall ? count - at : kTall;
    kScores<kStride>[keys](c.keys + (s + at)* c.stride, c.stride, c.scratch, c.D,
                           scores + at* kLanes);
  }
}

// out[d, lane] = out · shrink[lane] + Σ_s value[s, d] · weight[s, lane], T dimensions.
template <int T>
void mix(const float* value, int64_t stride, const float* weights, int64_t count, Register shrink_a,
         Register shrink_b, float* out) {
  Register sum[T][2];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    sum[t][0] = V::multiply(V::load(out + t * kLanes), shrink_a);
    sum[t][1] = V::multiply(V::load(out + t * kLanes + kWidth), shrink_b);
  }
  for (int64_t s = 0; s < count; ++s) {
    const Register a = V::load(weights + s * kLanes), b = V::load(weights + s * kLanes + kWidth);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      const Register v = V::set(value[s * stride + t]);
      sum[t][0] = V::fma(v, a, sum[t][0]);
      sum[t][1] = V::fma(v, b, sum[t][1]);
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    V::store(out + t * kLanes, sum[t][0]);
    V::store(out + t * kLanes + kWidth, sum[t][1]);
  }
}

// Adds the mask, and hides keys beyond what each lane sees.
void hide(const AttentionTile& c, int64_t first, int64_t lanes, int64_t s, int64_t count,
          float* scores) {
  for (int64_t lane = 0; lane < lanes; ++lane) {
    if (c.mask != nullptr) {
      const float* const mask = c.mask[first + lane] + s;
      for (int64_t i = 0; i < count; ++i) scores[i * kLanes + lane] += mask[i];
    }
    const int64_t seen = c.visible[first + lane] - s;
    for (int64_t i = seen < 0 ? 0 : seen; i < count; ++i) scores[i * kLanes + lane] = kHidden;
  }
}

// Queries first … first + lanes of the tile, in lanes.
void attend_lanes(const AttentionTile& c, int64_t first, int64_t lanes) {
  float* const queries = c.scratch;           // [D, kLanes]
  float* const out = queries + c.D * kLanes;  // [D, kLanes]
  float* const scores = out + c.D * kLanes;   // [kKeys, kLanes]
  for (int64_t d = 0; d < c.D * kLanes; ++d) queries[d] = out[d] = 0.0f;
  int64_t keys = 0, all_see = INT64_MAX;
  for (int64_t lane = 0; lane < lanes; ++lane) {
    const float* const query = c.query[first + lane];
    for (int64_t d = 0; d < c.D; ++d) queries[d * kLanes + lane] = query[d] * c.scaling;
    const int64_t seen = c.visible[first + lane];
    keys = seen > keys ? seen : keys;
    all_see = seen < all_see ? seen : all_see;
  }
  Register top[2], sum[2];
  for (int i = 0; i < 2; ++i) top[i] = V::set(kHidden), sum[i] = V::set(0.0f);
  for (int64_t s = 0; s < keys; s += kKeys) {
    const int64_t count = keys - s < kKeys ? keys - s : kKeys;
    if (c.D == 64 && c.stride == 64) {
      score_block<64>(c, s, count, scores);
    } else if (c.D == 128 && c.stride == 128) {
      score_block<128>(c, s, count, scores);
    } else {
      score_block<0>(c, s, count, scores);
    }
    if (c.mask != nullptr || s + count > all_see) hide(c, first, lanes, s, count, scores);
    Register shrink[2];
    for (int i = 0; i < 2; ++i) {
      float* const column = scores + i * kWidth;
      Register high = top[i];
      for (int64_t k = 0; k < count; ++k) high = V::max(high, V::load(column + k * kLanes));
      shrink[i] = exponential(V::subtract(top[i], high));
      Register total = V::multiply(sum[i], shrink[i]);
      for (int64_t k = 0; k < count; ++k) {
        const Register weight = exponential(V::subtract(V::load(column + k * kLanes), high));
        V::store(column + k * kLanes, weight);
        total = V::add(total, weight);
      }
      top[i] = high;
      sum[i] = total;
    }
    const float* const values = c.values + s * c.stride;
    int64_t d = 0;
    for (; d + kDims <= c.D; d += kDims) {
      mix<kDims>(values + d, c.stride, scores, count, shrink[0], shrink[1], out + d * kLanes);
    }
    for (; d < c.D; ++d) {
      mix<1>(values + d, c.stride, scores, count, shrink[0], shrink[1], out + d * kLanes);
    }
  }
  float inverse[kLanes];
  for (int i = 0; i < 2; ++i) {
    V::store(inverse + i * kWidth, V::divide(V::set(1.0f), V::max(sum[i], V::set(1e-37f))));
  }
  for (int64_t lane = 0; lane < lanes; ++lane) {
    float* const target = c.out[first + lane];
    for (int64_t d = 0; d < c.D; ++d) target[d] = out[d * kLanes + lane] * inverse[lane];
  }
}

// One query with D in lanes; kWidth divides D.
void attend_one(const AttentionTile& c, int64_t lane) {
  const int64_t D = c.D, keys = c.visible[lane];
  const float* const query = c.query[lane];
  float* const out = c.out[lane];
  float* const scores = c.scratch;  // [kKeys]
  float top = kHidden, sum = 0.0f;
  for (int64_t d = 0; d < D; ++d) out[d] = 0.0f;
  for (int64_t s = 0; s < keys; s += kKeys) {
    const int64_t count = keys - s < kKeys ? keys - s : kKeys;
    float high = top;
    for (int64_t k = 0; k < count; ++k) {
      const float* const key = c.keys + (s + k) * c.stride;
      Register dot = V::multiply(V::load(query), V::load(key));
      for (int64_t d = kWidth; d < D; d += kWidth) {
        dot = V::fma(V::load(query + d), V::load(key + d), dot);
      }
      scores[k] = V::sum(dot) * c.scaling + (c.mask == nullptr ? 0.0f : c.mask[lane][s + k]);
      high = scores[k] > high ? scores[k] : high;
    }
    for (int64_t k = count; k < count + kWidth; ++k) scores[k] = 2 * kHidden;  // weighs nothing
    Register total = V::set(0.0f);
    for (int64_t k = 0; k < count; k += kWidth) {
      const Register weight = exponential(V::subtract(V::load(scores + k), V::set(high)));
      V::store(scores + k, weight);
      total = V::add(total, weight);
    }
    float shrink[kWidth];
    V::store(shrink, exponential(V::set(top - high)));
    sum = sum * shrink[0] + V::sum(total);
    top = high;
    // Four registers of outputs at once, so that their sums do not wait for one another.
    for (int64_t d = 0; d < D; d += 4 * kWidth) {
      const int64_t parts = (D - d) / kWidth < 4 ? (D - d) / kWidth : 4;
      Register mixed[4];
      for (int64_t i = 0; i < parts; ++i) {
        mixed[i] = V::multiply(V::load(out + d + i * kWidth), V::set(shrink[0]));
      }
      const float* value = c.values + s * c.stride + d;
      if (parts == 4) {
        for (int64_t k = 0; k < count; ++k, value += c.stride) {
          const Register weight = V::set(scores[k]);
#pragma GCC unroll 4
          for (int64_t i = 0; i < 4; ++i) {
            mixed[i] = V::fma(weight, V::load(value + i * kWidth), mixed[i]);
          }
        }
      } else {
        for (int64_t k = 0; k < count; ++k, value += c.stride) {
          const Register weight = V::set(scores[k]);
          for (int64_t i = 0; i < parts; ++i) {
            mixed[i] = V::fma(weight, V::load(value + i * kWidth), mixed[i]);
          }
        }
      }
      for (int64_t i = 0; i < parts; ++i) V::store(out + d + i * kWidth, mixed[i]);
    }
  }
  const float inverse = 1.0f / (sum > 1e-37f ? sum : 1e-37f);
  for (int64_t d = 0; d < D; ++d) out[d] *= inverse;
}

void attend(const AttentionTile& c) {
  // A query alone takes D / kWidth steps a key, a tile of kLanes takes 2 · D.
  const bool alone = c.lanes <= kWidth && c.D % kWidth == 0;
  for (int64_t lane = 0; alone && lane < c.lanes; ++lane) attend_one(c, lane);
  for (int64_t first = 0; !alone && first < c.lanes; first += kLanes) {
    attend_lanes(c, first, c.lanes - first < kLanes ? c.lanes - first : kLanes);
  }
}

}  // namespace
}  // namespace llmq
