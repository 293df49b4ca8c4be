/* SPDX-License-Identifier: MIT */
/* Threads, a lock and a condition: pthreads, or Win32. Only pool.c uses them.
 *
 * A thread runs THREAD_MAIN f(void *arg), which ends with `return 0`; thread_start() is whether it does. What is waited
 * for on a condition is changed, or its waiters are woken, while the lock is held. */
#ifndef PHI3C_THREAD_H
#define PHI3C_THREAD_H

#include <stddef.h>

/* Matrices take 300 KiB of a stack, attention 100; musl would give a thread 128, and thread-local data of others, such
 * as the thread sanitizer's, comes out of it. */
enum { STACK_BYTES = 2 << 20 };

#ifdef _WIN32

#include <process.h>
#include <windows.h>

#define THREAD_MAIN unsigned __stdcall
typedef HANDLE thread;
typedef SRWLOCK lock; /* this and the condition are freed by nobody */
typedef CONDITION_VARIABLE condition;

static inline int thread_start(thread *t, unsigned(__stdcall *run)(void *), void *arg) {
    *t = (HANDLE)_beginthreadex(NULL, STACK_BYTES, run, arg, STACK_SIZE_PARAM_IS_A_RESERVATION, NULL);
    return *t != NULL;
}

static inline void thread_join(thread t) {
    WaitForSingleObject(t, INFINITE);
    CloseHandle(t);
}

static inline void thread_yield(void) { SwitchToThread(); }

static inline void lock_init(lock *l) { InitializeSRWLock(l); }
static inline void lock_destroy(lock *l) { (void)l; }
static inline void lock_take(lock *l) { AcquireSRWLockExclusive(l); }
static inline void lock_release(lock *l) { ReleaseSRWLockExclusive(l); }

static inline void condition_init(condition *c) { InitializeConditionVariable(c); }
static inline void condition_destroy(condition *c) { (void)c; }
static inline void condition_wait(condition *c, lock *l) { SleepConditionVariableSRW(c, l, INFINITE, 0); }
static inline void condition_wake_all(condition *c) { WakeAllConditionVariable(c); }

#else

#include <pthread.h>
#include <sched.h>

#define THREAD_MAIN void *
typedef pthread_t thread;
typedef pthread_mutex_t lock;
typedef pthread_cond_t condition;

static inline int thread_start(thread *t, void *(*run)(void *), void *arg) {
    pthread_attr_t attributes;
    if (pthread_attr_init(&attributes) != 0) return 0;
    pthread_attr_setstacksize(&attributes, STACK_BYTES);
    int error = pthread_create(t, &attributes, run, arg);
    pthread_attr_destroy(&attributes);
    return error == 0;
}

static inline void thread_join(thread t) { pthread_join(t, NULL); }
static inline void thread_yield(void) { sched_yield(); }

static inline void lock_init(lock *l) { pthread_mutex_init(l, NULL); }
static inline void lock_destroy(lock *l) { pthread_mutex_destroy(l); }
static inline void lock_take(lock *l) { pthread_mutex_lock(l); }
static inline void lock_release(lock *l) { pthread_mutex_unlock(l); }

static inline void condition_init(condition *c) { pthread_cond_init(c, NULL); }
static inline void condition_destroy(condition *c) { pthread_cond_destroy(c); }
static inline void condition_wait(condition *c, lock *l) { pthread_cond_wait(c, l); }
static inline void condition_wake_all(condition *c) { pthread_cond_broadcast(c); }

#endif

#endif
