/* SPDX-License-Identifier: MIT */
/* The thread pool: a parallel-for whose items any thread may take, so that a thread which the operating system
 * has put aside delays a job by at most the one chunk it holds.
 *
 * `ticket` is (epoch << 32 | next chunk), changed by compare-and-swap only. A worker reads the ticket, then the
 * job, and the swap succeeds only if both still belong together: the caller marks the ticket CLOSED before it
 * writes another job. Idle workers spin for some microseconds (the gap between two operations of a layer
 * is shorter), yield, then park on a condition variable. */
#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>

enum { SPINS = 200, YIELDS = 16 }; /* a pause takes 10-40 ns: 2-8 us of spinning (docs/performance.md) */
#define CLOSED 0xffffffffu

struct phi3c_pool {
    _Alignas(64) _Atomic uint64_t ticket;
    _Alignas(64) _Atomic int64_t chunks_done;
    _Alignas(64) phi3c_work *_Atomic work;
    void *_Atomic arg;
    _Atomic int64_t n_items, grain, n_chunks;
    _Alignas(64) _Atomic int parked;
    _Atomic int stop;
    pthread_mutex_t mutex;
    pthread_cond_t wake;
    int n_threads;
    pthread_t threads[]; /* n_threads - 1 workers */
};

static inline void cpu_pause(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb"); /* `yield` returns at once on most cores */
#endif
}

/* Take chunks of the current job until none is left; returns the last ticket seen. */
static uint64_t take_chunks(phi3c_pool *pool) {
    for (;;) {
        uint64_t ticket = atomic_load(&pool->ticket);
        uint32_t chunk = (uint32_t)ticket;
        int64_t n_chunks = atomic_load(&pool->n_chunks), n_items = atomic_load(&pool->n_items);
        int64_t grain = atomic_load(&pool->grain);
        phi3c_work *work = atomic_load(&pool->work);
        void *arg = atomic_load(&pool->arg);
        if (chunk == CLOSED || chunk >= n_chunks) return ticket;
        if (!atomic_compare_exchange_weak(&pool->ticket, &ticket, ticket + 1)) continue;
        int64_t first = chunk * grain, last = first + grain;
        work(arg, first, last < n_items ? last : n_items);
        atomic_fetch_add(&pool->chunks_done, 1);
    }
}

static int has_news(phi3c_pool *pool, uint64_t seen) {
    return atomic_load(&pool->ticket) >> 32 != seen >> 32 || atomic_load(&pool->stop);
}

static void *worker(void *arg) {
    phi3c_pool *pool = arg;
    uint64_t seen = 0;
    for (;;) {
        for (int i = 0; i < SPINS && !has_news(pool, seen); i++) cpu_pause();
        for (int i = 0; i < YIELDS && !has_news(pool, seen); i++) sched_yield();
        if (!has_news(pool, seen)) {
            pthread_mutex_lock(&pool->mutex);
            atomic_fetch_add(&pool->parked, 1); /* before the check: phi3c_pool_run looks here after its news */
            while (!has_news(pool, seen)) pthread_cond_wait(&pool->wake, &pool->mutex);
            atomic_fetch_sub(&pool->parked, 1);
            pthread_mutex_unlock(&pool->mutex);
        }
        if (atomic_load(&pool->stop)) return NULL;
        seen = take_chunks(pool);
    }
}

static void wake_parked(phi3c_pool *pool) {
    if (atomic_load(&pool->parked) == 0) return;
    pthread_mutex_lock(&pool->mutex);
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->mutex);
}

void phi3c_pool_run(phi3c_pool *pool, phi3c_work *work, void *arg, int64_t n_items, int64_t grain) {
    if (n_items <= 0) return;
    int64_t n_chunks = (n_items + grain - 1) / grain;
    if (pool->n_threads == 1 || n_chunks == 1) {
        work(arg, 0, n_items);
        return;
    }
    uint64_t epoch = (atomic_load(&pool->ticket) >> 32) + 1;
    atomic_store(&pool->work, work); /* the ticket is CLOSED: nobody acts on these yet */
    atomic_store(&pool->arg, arg);
    atomic_store(&pool->n_items, n_items);
    atomic_store(&pool->grain, grain);
    atomic_store(&pool->n_chunks, n_chunks);
    atomic_store(&pool->chunks_done, 0);
    atomic_store(&pool->ticket, epoch << 32);
    wake_parked(pool);
    take_chunks(pool);
    for (int i = 0; atomic_load(&pool->chunks_done) < n_chunks; i++) {
        if (i < SPINS)
            cpu_pause();
        else
            sched_yield();
    }
    atomic_store(&pool->ticket, epoch << 32 | CLOSED);
}

phi3c_pool *phi3c_pool_new(int n_threads) {
    size_t size = sizeof(phi3c_pool) + (size_t)n_threads * sizeof(pthread_t);
    phi3c_pool *pool = aligned_alloc(64, (size + 63) / 64 * 64);
    if (!pool) return NULL;
    *pool = (phi3c_pool){.ticket = CLOSED, .n_threads = 1};
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->wake, NULL);
    for (; pool->n_threads < n_threads; pool->n_threads++)
        if (pthread_create(&pool->threads[pool->n_threads - 1], NULL, worker, pool) != 0) break;
    if (pool->n_threads == n_threads) return pool;
    phi3c_pool_free(pool);
    return NULL;
}

void phi3c_pool_free(phi3c_pool *pool) {
    if (!pool) return;
    atomic_store(&pool->stop, 1);
    pthread_mutex_lock(&pool->mutex);
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->mutex);
    for (int i = 0; i < pool->n_threads - 1; i++) pthread_join(pool->threads[i], NULL);
    pthread_cond_destroy(&pool->wake);
    pthread_mutex_destroy(&pool->mutex);
    free(pool);
}

int phi3c_pool_size(const phi3c_pool *pool) { return pool->n_threads; }
