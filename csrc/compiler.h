/* SPDX-License-Identifier: MIT */
/* What compilers spell differently: gcc and clang, clang-cl among them, and MSVC.
 * PREFETCH: a line of the cache that will be read soon. */
#ifndef PHI3C_COMPILER_H
#define PHI3C_COMPILER_H

#include <stdint.h>

#if defined(_MSC_VER) && !defined(__clang__)

#include <xmmintrin.h>
#if _MSC_VER < 1930
#error "Visual Studio 2022 or later: /fp:precise of earlier ones fuses multiplications with additions"
#endif
#define INLINE static __forceinline
#define NOINLINE static __declspec(noinline)
#define UNROLL
#define PREFETCH(p) _mm_prefetch((const char *)(p), _MM_HINT_T1)

#include <intrin.h>

/* The number of the lowest bit that is set in bits, which are not all 0. */
INLINE int lowest_bit(uint32_t bits) {
    unsigned long i;
    _BitScanForward(&i, bits);
    return (int)i;
}

#else

#define INLINE static inline __attribute__((always_inline))
#define NOINLINE static __attribute__((noinline))
#define UNROLL _Pragma("GCC unroll 12")
#define PREFETCH(p) __builtin_prefetch(p, 0, 2)

INLINE int lowest_bit(uint32_t bits) { return __builtin_ctz(bits); }

#endif

#endif
