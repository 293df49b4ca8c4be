/* SPDX-License-Identifier: MIT */
/* What compilers spell differently: gcc and clang, clang-cl among them, and MSVC. */
#ifndef PHI3C_COMPILER_H
#define PHI3C_COMPILER_H

#if defined(_MSC_VER) && !defined(__clang__)

#if _MSC_VER < 1930
#error "Visual Studio 2022 or later: /fp:precise of earlier ones fuses multiplications with additions"
#endif
#define INLINE static __forceinline
#define NOINLINE static __declspec(noinline)
#define UNROLL
#if defined(_M_ARM64)
#define PREFETCH(address) __prefetch(address)
#else
#include <xmmintrin.h>
#define PREFETCH(address) _mm_prefetch((const char *)(address), _MM_HINT_T0)
#endif

#else

#define INLINE static inline __attribute__((always_inline))
#define NOINLINE static __attribute__((noinline))
#define UNROLL _Pragma("GCC unroll 12")
#define PREFETCH(address) __builtin_prefetch(address)

#endif

#endif
