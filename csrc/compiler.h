/* SPDX-License-Identifier: MIT */
/* What compilers spell differently: gcc and clang, clang-cl among them, and MSVC. */
#ifndef PHI3C_COMPILER_H
#define PHI3C_COMPILER_H

#include <stdint.h>

#if defined(_MSC_VER) && !defined(__clang__)

#include <intrin.h>

#if _MSC_VER < 1930
#error "Visual Studio 2022 or later: /fp:precise of earlier ones fuses multiplications with additions"
#endif
#define INLINE static __forceinline
#define NOINLINE static __declspec(noinline)
#define UNROLL

INLINE int lowest_bit(uint32_t bits) {
    unsigned long i;
    _BitScanForward(&i, bits);
    return (int)i;
}

INLINE void prefetch(const void *address) { _mm_prefetch((const char *)address, _MM_HINT_T1); }

#else

#define INLINE static inline __attribute__((always_inline))
#define NOINLINE static __attribute__((noinline))
#define UNROLL _Pragma("GCC unroll 12")

/* The number of the lowest bit that is set in bits, which are not all 0. */
INLINE int lowest_bit(uint32_t bits) { return __builtin_ctz(bits); }

/* Ask for the line of the cache that holds an address, into L2. */
INLINE void prefetch(const void *address) { __builtin_prefetch(address, 0, 2); }

#endif

#endif
