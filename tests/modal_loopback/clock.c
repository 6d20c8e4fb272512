/* A wall clock that a test moves while programs run: preloaded, it adds the seconds in a shared file to the time of
 * day, and takes them off the deadlines that the kernel measures by its own clock. Monotonic clocks stay as they are.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define EPOCH_LIKE 1000000000 /* a deadline with fewer seconds counts from the machine's start */

static int64_t ahead_s(void) {
    static const volatile int64_t *shared;
    static const int64_t nothing = 0;
    if (!shared) {
        const char *path = getenv("MODAL_LOOPBACK_CLOCK");
        int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
        void *page = file < 0 ? MAP_FAILED : mmap(0, sizeof *shared, PROT_READ, MAP_SHARED, file, 0);
        shared = page == MAP_FAILED ? &nothing : page;
        if (file >= 0) close(file);
    }
    return *shared;
}

static const struct timespec *kernel_time(const struct timespec *deadline, struct timespec *copy) {
    if (!deadline || deadline->tv_sec < EPOCH_LIKE) return deadline;
    *copy = *deadline;
    copy->tv_sec -= ahead_s();
    return copy;
}

/* `next` becomes the function that this one stands in front of. */
#define NEXT(name) \
    static __typeof__(&name) next; \
    if (!next) next = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

int clock_gettime(clockid_t clock, struct timespec *now) {
    NEXT(clock_gettime);
    int failed = next(clock, now);
    if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += ahead_s();
    return failed;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    NEXT(gettimeofday);
    int failed = next(now, zone);
    if (!failed) now->tv_sec += ahead_s();
    return failed;
}

time_t time(time_t *out) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out) *out = now.tv_sec;
    return now.tv_sec;
}

int sem_timedwait(sem_t *restrict semaphore, const struct timespec *restrict deadline) {
    NEXT(sem_timedwait);
    struct timespec copy;
    return next(semaphore, kernel_time(deadline, &copy));
}

int sem_clockwait(sem_t *restrict semaphore, clockid_t clock, const struct timespec *restrict deadline) {
    NEXT(sem_clockwait);
    struct timespec copy;
    return next(semaphore, clock, kernel_time(deadline, &copy));
}

int pthread_mutex_timedlock(pthread_mutex_t *restrict mutex, const struct timespec *restrict deadline) {
    NEXT(pthread_mutex_timedlock);
    struct timespec copy;
    return next(mutex, kernel_time(deadline, &copy));
}

int pthread_cond_clockwait(pthread_cond_t *restrict condition, pthread_mutex_t *restrict mutex, clockid_t clock,
                           const struct timespec *restrict deadline) {
    NEXT(pthread_cond_clockwait);
    struct timespec copy;
    return next(condition, mutex, clock, kernel_time(deadline, &copy));
}

int pthread_cond_timedwait(pthread_cond_t *restrict condition, pthread_mutex_t *restrict mutex,
                           const struct timespec *restrict deadline) {
    static __typeof__(&pthread_cond_timedwait) next;
    /* On x86-64 an unversioned look-up may find the condition variables of before 2003. */
    if (!next) next = (__typeof__(next))dlvsym(RTLD_NEXT, "pthread_cond_timedwait", "GLIBC_2.3.2");
    if (!next) next = (__typeof__(next))dlsym(RTLD_NEXT, "pthread_cond_timedwait");
    struct timespec copy;
    return next(condition, mutex, kernel_time(deadline, &copy));
}

long syscall(long number, ...) {
    NEXT(syscall);
    va_list list;
    long a[6];
    va_start(list, number);
    for (int i = 0; i < 6; i++) a[i] = va_arg(list, long);
    va_end(list);
    struct timespec copy;
    if (number == SYS_futex && (a[1] & FUTEX_CMD_MASK) == FUTEX_WAIT_BITSET && (a[1] & FUTEX_CLOCK_REALTIME))
        a[3] = (long)kernel_time((const struct timespec *)a[3], &copy);
    return next(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}
