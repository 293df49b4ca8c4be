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

#else

#define INLINE static inline __attribute__((always_inline))
#define NOINLINE static __attribute__((noinline))
#define UNROLL _Pragma("GCC unroll 12")

#endif

#endif
