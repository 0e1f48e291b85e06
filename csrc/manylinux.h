// Included ahead of all else in manylinux wheels (tools/wheels.sh), which GCC 12 builds on glibc
// 2.36: leaves out what glibc 2.28 and the libstdc++ beside it do not have.
#pragma once

#include <istream>
#include <ostream>

// String streams are instantiated here rather than taken from libstdc++, where they are newer. Not
// so the streams beneath them: their locale facets must be those of libstdc++.
#undef _GLIBCXX_EXTERN_TEMPLATE
#define _GLIBCXX_EXTERN_TEMPLATE 0
#include <sstream>
#undef _GLIBCXX_EXTERN_TEMPLATE
#define _GLIBCXX_EXTERN_TEMPLATE 1

// Of glibc 2.32. Reference counts read it to leave out atomics while a process has one thread.
extern "C" {
[[gnu::weak, gnu::visibility("hidden")]] extern char __libc_single_threaded;
char __libc_single_threaded = 0;
}
