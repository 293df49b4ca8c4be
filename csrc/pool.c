/* SPDX-License-Identifier: MIT */
/* The thread pool: a parallel-for whose items any thread may take, so that a thread which the operating system
 * has put aside delays a job by at most the one chunk it holds, and those that wait for it.
 *
 * `ticket` is (epoch << 32 | next chunk), changed by compare-and-swap only. A worker reads the ticket, then the
 * job, and the swap succeeds only if both still belong together: the caller marks the ticket CLOSED before it
 * writes another job. Idle workers spin for some microseconds (the gap between two operations of a layer
 * is shorter), yield, then park on a condition variable. */
#include "pool.h"

#include <stdlib.h>

#include "atomic.h"
#include "thread.h"

enum { SPINS = 200, YIELDS = 16 }; /* a pause takes 10-40 ns: 2-8 us of spinning (docs/performance.md) */
#define CLOSED 0xffffffffu

/* What different threads write does not share a line of the cache: 64 bytes, 128 on some processors. */
struct phi3c_pool {
    atomic_word ticket;
    uint8_t apart1[128];
    atomic_word chunks_done;
    uint8_t apart2[128];
    atomic_word work, arg; /* pointers, as integers */
    atomic_word n_items, grain, n_chunks;
    uint8_t apart3[128];
    atomic_word parked, stop;
    lock lock;
    condition wake;
    int n_threads;
    thread threads[]; /* n_threads - 1 workers */
};

static inline void cpu_pause(void) {
#if defined(__aarch64__)
    __asm__ volatile("isb"); /* `yield` returns at once on most cores */
#elif defined(_M_ARM64)
    __isb(_ARM64_BARRIER_SY);
#elif defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(_M_X64)
    _mm_pause();
#endif
}

void phi3c_pool_wait(const atomic_word *word, int64_t least) {
    for (int i = 0; word_load(word) < least; i++) {
        if (i < SPINS)
            cpu_pause();
        else
            thread_yield();
    }
}

static uint64_t ticket_of(const phi3c_pool *pool) { return (uint64_t)word_load(&pool->ticket); }

/* Take chunks of the current job until none is left; returns the last ticket seen. */
static uint64_t take_chunks(phi3c_pool *pool) {
    for (;;) {
        uint64_t ticket = ticket_of(pool);
        uint32_t chunk = (uint32_t)ticket;
        int64_t n_chunks = word_load(&pool->n_chunks), n_items = word_load(&pool->n_items);
        int64_t grain = word_load(&pool->grain);
        phi3c_work *work = (phi3c_work *)(intptr_t)word_load(&pool->work);
        void *arg = (void *)(intptr_t)word_load(&pool->arg);
        if (chunk == CLOSED || chunk >= n_chunks) return ticket;
        if (!word_replace(&pool->ticket, (int64_t)ticket, (int64_t)(ticket + 1))) continue;
        int64_t first = chunk * grain, last = first + grain;
        work(arg, first, last < n_items ? last : n_items);
        word_add(&pool->chunks_done, 1);
    }
}

static int has_news(const phi3c_pool *pool, uint64_t seen) {
    return ticket_of(pool) >> 32 != seen >> 32 || word_load(&pool->stop);
}

static THREAD_MAIN worker(void *arg) {
    phi3c_pool *pool = arg;
    uint64_t seen = 0;
    for (;;) {
        for (int i = 0; i < SPINS && !has_news(pool, seen); i++) cpu_pause();
        for (int i = 0; i < YIELDS && !has_news(pool, seen); i++) thread_yield();
        if (!has_news(pool, seen)) {
            lock_take(&pool->lock);
            word_add(&pool->parked, 1); /* before the check: phi3c_pool_run looks here after its news */
            while (!has_news(pool, seen)) condition_wait(&pool->wake, &pool->lock);
            word_add(&pool->parked, -1);
            lock_release(&pool->lock);
        }
        if (word_load(&pool->stop)) return 0;
        seen = take_chunks(pool);
    }
}

static void wake_parked(phi3c_pool *pool) {
    if (word_load(&pool->parked) == 0) return;
    lock_take(&pool->lock);
    condition_wake_all(&pool->wake);
    lock_release(&pool->lock);
}

void phi3c_pool_run(phi3c_pool *pool, phi3c_work *work, void *arg, int64_t n_items, int64_t grain) {
    if (n_items <= 0) return;
    int64_t n_chunks = (n_items + grain - 1) / grain;
    if (pool->n_threads == 1 || n_chunks == 1) { /* by chunks here too: they fit the caches */
        for (int64_t first = 0; first < n_items; first += grain)
            work(arg, first, n_items - first < grain ? n_items : first + grain);
        return;
    }
    uint64_t epoch = (ticket_of(pool) >> 32) + 1;
    word_store(&pool->work, (int64_t)(intptr_t)work); /* the ticket is CLOSED: nobody acts on these yet */
    word_store(&pool->arg, (int64_t)(intptr_t)arg);
    word_store(&pool->n_items, n_items);
    word_store(&pool->grain, grain);
    word_store(&pool->n_chunks, n_chunks);
    word_store(&pool->chunks_done, 0);
    word_store(&pool->ticket, (int64_t)(epoch << 32));
    wake_parked(pool);
    take_chunks(pool);
    phi3c_pool_wait(&pool->chunks_done, n_chunks);
    word_store(&pool->ticket, (int64_t)(epoch << 32 | CLOSED));
}

phi3c_pool *phi3c_pool_new(int n_threads) {
    phi3c_pool *pool = calloc(1, sizeof(phi3c_pool) + (size_t)n_threads * sizeof(thread));
    if (!pool) return NULL;
    pool->n_threads = 1;
    word_store(&pool->ticket, CLOSED);
    lock_init(&pool->lock);
    condition_init(&pool->wake);
    for (; pool->n_threads < n_threads; pool->n_threads++)
        if (!thread_start(&pool->threads[pool->n_threads - 1], worker, pool)) break;
    if (pool->n_threads == n_threads) return pool;
    phi3c_pool_free(pool);
    return NULL;
}

void phi3c_pool_free(phi3c_pool *pool) {
    if (!pool) return;
    word_store(&pool->stop, 1);
    lock_take(&pool->lock);
    condition_wake_all(&pool->wake);
    lock_release(&pool->lock);
    for (int i = 0; i < pool->n_threads - 1; i++) thread_join(pool->threads[i]);
    condition_destroy(&pool->wake);
    lock_destroy(&pool->lock);
    free(pool);
}

int phi3c_pool_size(const phi3c_pool *pool) { return pool->n_threads; }
