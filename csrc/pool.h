/* SPDX-License-Identifier: MIT */
/* Parallel-for over a pool of threads, for the C files that hold one operation each. */
#ifndef PHI3C_POOL_H
#define PHI3C_POOL_H

#include "phi3c.h"

/* Does items [first, last) of a job. */
typedef void phi3c_work(void *arg, int64_t first, int64_t last);

/* Run items [0, n_items), `grain` of them at a time, on all threads of the pool; returns when all are done. Which
 * thread does which items is not fixed: work must not depend on it. */
void phi3c_pool_run(phi3c_pool *pool, phi3c_work *work, void *arg, int64_t n_items, int64_t grain);

#endif
