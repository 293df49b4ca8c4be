/* SPDX-License-Identifier: MIT */
/* Parallel-for over a pool of threads, for the C files that hold one operation each. */
#ifndef PHI3C_POOL_H
#define PHI3C_POOL_H

#include "atomic.h"
#include "phi3c.h"

/* Does items [first, last) of a job. */
typedef void phi3c_work(void *arg, int64_t first, int64_t last);

/* Run items [0, n_items), `grain` of them at a time, on all threads of the pool; returns when all are done. Which
 * thread does which items is not fixed: work must not depend on it. */
void phi3c_pool_run(phi3c_pool *pool, phi3c_work *work, void *arg, int64_t n_items, int64_t grain);

/* Wait until *word is `least` or more. Within an item only for what an item before it does: items are begun in their
 * order, so that one is done or on a thread, and the first of those on a thread waits for none. */
void phi3c_pool_wait(const atomic_word *word, int64_t least);

#endif
