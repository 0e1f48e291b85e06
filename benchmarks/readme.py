"""Fills the tables of the README and of docs/ from the files in `results/` that their markers name.

    python -m benchmarks.readme                              # after any benchmark wrote its file
    python -m benchmarks.readme --demo demo-report/demo.json # keeps a demo's figures first

A table stands between `<!-- table KIND FILE[,FILE …] -->` and `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks import algorithms, compare, results
from benchmarks.peers import PEERS
from llmq.commands import demo_report

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
_CASES = {  # of benchmarks.recovery
    "minilm": "MiniLM, 50 % sparse w8a8",
    "t5": "T5, 50 % sparse w8a8",
    "bert": "MiniLM, a quarter of heads and channels gone",
}
_TABLE = re.compile(r"(<!-- table (\w+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def linear(record: dict[str, Any]) -> str:
    """Return times as fast as torch's float32, a row a scheme, a column a shape and M."""
    shapes = ((576, 576), (4096, 4096))
    columns = [(N, K, M) for N, K in shapes for M in (1, 16, 256)]
    found = {(r["scheme"], r["N"], r["K"], r["M"]): r for r in record["records"]}
    schemes = list(dict.fromkeys(r["scheme"] for r in record["records"]))
    head = ["", *(f"{N}×{K}, M={M}" for N, K, M in columns)]
    rows = []
    for scheme in schemes:
        cells = [found.get((scheme, *column)) for column in columns]
        if scheme == "float32":
            texts = [f"{c['microseconds']:.0f} µs" if c else "" for c in cells]
        else:
            texts = [f"{c['times_float32']:.1f}×" if c else "" for c in cells]
        rows.append([scheme, *texts])
    return f"{_table(head, rows)}\n\n{_machine(record)}."


def peers(record: dict[str, Any]) -> str:
    """Return times as fast as the best other library of the same family, a row a scheme."""
    columns = [((N, K), M) for N, K in ((576, 576), (4096, 4096)) for M in (1, 16, 256)]
    head = ["", *(f"{N}×{K}, M={M}" for (N, K), M in columns)]
    cases = compare.cases(record["records"])
    rows = []
    for name in (n for n in PEERS if n.startswith("llmq")):
        texts = []
        for shape, M in columns:
            best = compare.best_peer(cases[shape], PEERS[name].family, M)
            own = cases[shape].get(name, {}).get(M)
            texts.append(f"{best['seconds'] / own['seconds']:.2f}×" if best and own else "")
        rows.append([name, *texts])
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return f"{_table(head, rows)}\n\n{_machine(record)}; {versions}."


def model(record: dict[str, Any]) -> str:
    """Return tokens/s of a whole model, a row a scheme."""
    speeds = record["tokens_per_second"]
    rows = [
        [name, *(f"{speed[w]:.0f}" if w in speed else "" for w in ("prefill", "decode"))]
        for name, speed in speeds.items()
    ]
    return f"{_table(['', 'prefill tok/s', 'decode tok/s'], rows)}\n\n{_machine(record)}."


def recovery(*records: dict[str, Any]) -> str:
    """Return what a task's model scored before, compressed and recovered: means over seeds.

    The interval is the widest: from the least lower to the greatest upper end.
    """
    titles = {"r8": "Reuters R8", "retrieval": "retrieval", "exact_match": "exact match"}
    rows = []
    for case, seeds in _by_case(records).items():
        for metric, title in titles.items():
            if metric not in seeds[0]["rows"][0]:
                continue
            stages = zip(*(record["rows"] for record in seeds), strict=True)
            scores = [fmean(row[metric] for row in stage) for stage in stages]
            changes = [record["rows"][2][f"{metric}_change"] for record in seeds]
            value, low, high = _widest(changes)
            before, _, after = seeds[0]["rows"]
            size = f"{before['bytes'] / 1e6:.1f} → {after['bytes'] / 1e6:.1f}"
            shown = [f"{100 * score:.2f} %" for score in scores]
            interval = f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"
            rows.append([f"{_CASES[case]}: {title}", size, *shown, interval, str(len(seeds))])
    head = ["", "MB", "original", "compressed", "recovered", "points, 95 %", "seeds"]
    return _table(head, rows)


def smollm2(*records: dict[str, Any]) -> str:
    """Return perplexity and KL before and after training, and losses: means over a case's seeds.

    The interval is the widest: from the least lower to the greatest upper end.
    """
    texts = ("documentation", "articles")
    names = {"smollm2": "50 % sparse w8a8", "smollm2-original": "the original"}
    rows, curves = [], []
    for case, seeds in _by_case(records).items():
        for stage in zip(*(record["rows"] for record in seeds), strict=True):
            first = stage[0]
            done = f"{first['steps']} steps" if "steps" in first else "as it was"
            cells = [f"{names[case]}, {done}", f"{first['bytes'] / 1e6:.1f}"]
            for text in texts:
                value, low, high = _widest([row[text]["change"] for row in stage])
                cells.append(f"{fmean(row[text]['perplexity'] for row in stage):.2f}")
                cells.append(f"{value:+.0f} % [{low:+.0f}, {high:+.0f}]")
                cells.append(f"{fmean(row[text]['kl'] for row in stage):.3f}")
            rows.append([*cells, str(len(seeds))])
            if "validation" in first:
                points = zip(*(row["validation"] for row in stage), strict=True)
                steps = [(at[0][0], fmean(loss for _, loss in at)) for at in points]
                curve = ", ".join(f"{loss:.3f} after {step}" for step, loss in steps)
                curves.append(f"Validation loss of {names[case]}, by steps: {curve}.")
    head = ["", "MB"]
    for text in texts:
        head += [text, "to float32, 95 %", "KL"]
    return "\n\n".join([_table([*head, "seeds"], rows), *curves])


def _by_case(records: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return records of `benchmarks.recovery`, one a seed, by the case that their files name."""
    found: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        case = Path(record["file"]).stem.split("_", 1)[1].rpartition("_")[0].replace("_", "-")
        found.setdefault(case, []).append(record)
    return found


def _widest(changes: list[dict[str, Any]]) -> tuple[float, float, float]:
    """Return in percent the mean of values, the least lower and the greatest upper end."""
    value, low, high = (
        [100 * change[key] for change in changes] for key in ("value", "low", "high")
    )
    return fmean(value), min(low), max(high)


def plan(record: dict[str, Any]) -> str:
    """Return size, KL and speed of uniform formats and of the plan."""
    original, *models = record["rows"]
    speed = original["speed"]
    rows = [["float32", "1", "", "", f"{speed['prefill']:.0f}", f"{speed['decode']:.1f}", "", ""]]
    for row in models:
        cells = [row["name"], f"{row['linear_share']:.4f}"]
        for text in ("documentation", "articles"):
            kl = row[text]["kl"]
            cells.append(f"{kl['value']:.4f} [{kl['low']:.4f}, {kl['high']:.4f}]")
        for key in ("speed", "accelerated_speed"):
            cells += [f"{row[key]['prefill']:.0f}", f"{row[key]['decode']:.1f}"]
        rows.append(cells)
    head = ["", "linear bytes", "KL, documentation", "KL, articles", "prefill tok/s"]
    head += ["decode tok/s", "prefill, accelerated", "decode, accelerated"]
    return f"{_table(head, rows)}\n\n{_machine(record)}."


def schemes(quality: dict[str, Any], speed: dict[str, Any]) -> str:
    """Return size, perplexity and tokens/s of each form of SmolLM2 that both records hold."""
    rows = []
    original = next(row for row in quality["rows"] if row["name"] == "float32")
    for row in quality["rows"]:
        found = speed["tokens_per_second"].get(row["name"])
        if found is None:
            continue
        size = f"{row['bytes'] / 1e6:.0f}" if "bytes" in row else ""
        change = f"{row['perplexity'] / original['perplexity'] - 1:+.1%}".replace("%", " %")
        speeds = [f"{found[phase]:.0f}" for phase in ("prefill", "decode")]
        rows.append([row["name"], size, f"{row['perplexity']:.2f}", change, *speeds])
    head = ["", "MB", "perplexity", "to float32", "prefill tok/s", "decode tok/s"]
    judged = f"{quality['text']}; {_machine(quality)}"
    return f"{_table(head, rows)}\n\nSpeed: {_machine(speed)}. Perplexity: {judged}."


def cuda(records: list[dict[str, Any]]) -> str:
    """Return what counted instructions allow each CUDA kernel, in H100's read bandwidths."""
    rows = []
    for r in records:
        if r.get("tokens") != 8 or not r["gpu"].startswith("H100") or r["kernel"].endswith("half"):
            continue
        bounds = r["bounds, of bandwidth"]
        least = min(bounds.values())
        rows.append([f"{r['kernel']}, groups: {r['group']}", f"{least:.2f}", r["binds"]])
    return _table(["kernel", "least bound, of read bandwidth", "which"], rows)


def t5(record: dict[str, Any]) -> str:
    """Return a T5's exact match and phoneme error, a row a scheme."""
    rows = [
        [r["scheme"], f"{100 * r['exact_match']:.2f} %", f"{100 * r['phoneme_error']:.2f} %"]
        for r in record["rows"]
    ]
    return _table([f"{record['words']} words", "exact match", "phoneme error"], rows)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _machine(record: dict[str, Any]) -> str:
    m = record["machine"]
    plural = "" if m["threads"] == 1 else "s"
    return f"{m['cpu']}, {m['threads']} thread{plural}, {m['isa']}, torch {m['torch']}"


KINDS: dict[str, Callable[..., str]] = {
    "algorithms": algorithms.table,
    "cuda": cuda,
    "demo": demo_report.markdown,
    "linear": linear,
    "model": model,
    "peers": peers,
    "plan": plan,
    "recovery": recovery,
    "schemes": schemes,
    "smollm2": smollm2,
    "t5": t5,
}


def filled(text: str) -> str:
    """Return a page's text with every table made anew from the files that it names."""

    def table(match: re.Match[str]) -> str:
        start, kind, file, end = match.groups()
        records = [_record(name) for name in file.split(",")]
        return f"{start}{KINDS[kind](*records)}\n{end}"

    return _TABLE.sub(table, text)


def _record(name: str) -> Any:
    record = json.loads((ROOT / name).read_text())
    return record | {"file": name} if isinstance(record, dict) else record


def main() -> None:
    """Keep a demo's record if one is given, and write the README and the pages of docs/."""
    parser = argparse.ArgumentParser(description="fill tables of README and docs/ from results")
    parser.add_argument("--demo", type=Path, help="demo.json of a run to keep in results")
    args = parser.parse_args()
    if args.demo is not None:
        record = json.loads(args.demo.read_text())
        del record["layers"]
        print(results.write("demo", record))
    for page in PAGES:
        page.write_text(filled(page.read_text()))


if __name__ == "__main__":
    main()
