/* SPDX-License-Identifier: MIT */
/* Words that several threads change: what the pool needs of <stdatomic.h>, which MSVC does not have in full. All
 * operations stand in one order for all threads (sequential consistency). word_replace() is whether `old` was there;
 * then `new` is. */
#ifndef PHI3C_ATOMIC_H
#define PHI3C_ATOMIC_H

#include "phi3c.h"

#if defined(_MSC_VER) && !defined(__clang__)

/* Interlocked functions are full barriers, so that a load need only be an acquire. */
#include <windows.h>

static inline int64_t word_load(const atomic_word *w) { return ReadAcquire64((const LONG64 *)&w->value); }
static inline void word_store(atomic_word *w, int64_t value) { InterlockedExchange64(&w->value, value); }
static inline void word_add(atomic_word *w, int64_t n) { InterlockedExchangeAdd64(&w->value, n); }
static inline void word_xor(atomic_word *w, int64_t bits) { InterlockedXor64(&w->value, bits); }
static inline int word_replace(atomic_word *w, int64_t old, int64_t new) {
    return InterlockedCompareExchange64(&w->value, new, old) == old;
}

#else

static inline int64_t word_load(const atomic_word *w) { return __atomic_load_n(&w->value, __ATOMIC_SEQ_CST); }
static inline void word_store(atomic_word *w, int64_t value) { __atomic_store_n(&w->value, value, __ATOMIC_SEQ_CST); }
static inline void word_add(atomic_word *w, int64_t n) { __atomic_fetch_add(&w->value, n, __ATOMIC_SEQ_CST); }
static inline void word_xor(atomic_word *w, int64_t bits) { __atomic_fetch_xor(&w->value, bits, __ATOMIC_SEQ_CST); }
static inline int word_replace(atomic_word *w, int64_t old, int64_t new) {
    return __atomic_compare_exchange_n(&w->value, &old, new, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
}

#endif

#endif
