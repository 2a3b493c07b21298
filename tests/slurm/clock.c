/* Preloaded, the real-time clock of a process is ahead by the seconds (a long) in the file $CLOCKS/HOST, whenever they
   are written there: a machine whose clock jumps. The monotonic clock and the file system's time stamps stay. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long ahead(void) {
    static volatile long *seconds;
    static const long none = 0;
    if (!seconds) {
        char host[256] = "", name[4096];
        gethostname(host, sizeof host - 1);
        snprintf(name, sizeof name, "%s/%s", getenv("CLOCKS") ? getenv("CLOCKS") : "", host);
        int file = open(name, O_RDONLY | O_CLOEXEC);
        void *page = file < 0 ? MAP_FAILED : mmap(NULL, sizeof(long), PROT_READ, MAP_SHARED, file, 0);
        seconds = page == MAP_FAILED ? (volatile long *)&none : page;
        if (file >= 0) close(file);
    }
    return *seconds;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    int failed = (int)syscall(SYS_clock_gettime, clock, now);
    if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += ahead();
    return failed;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    (void)zone;
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    now->tv_sec = t.tv_sec;
    now->tv_usec = t.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *where) {
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    if (where) *where = t.tv_sec;
    return t.tv_sec;
}

/* The kernel's clock has not jumped, so a moment until which it waits is told in its time; a small one is monotonic. */
static struct timespec kernels(const struct timespec *until) {
    struct timespec t = *until;
    if (t.tv_sec > 1000000000) t.tv_sec -= ahead();
    return t;
}

int pthread_cond_timedwait(pthread_cond_t *condition, pthread_mutex_t *lock, const struct timespec *until) {
    static int (*wait)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *);
    if (!wait) *(void **)&wait = dlvsym(RTLD_NEXT, "pthread_cond_timedwait", "GLIBC_2.3.2"); /* x86-64's newest */
    if (!wait) *(void **)&wait = dlsym(RTLD_NEXT, "pthread_cond_timedwait");
    struct timespec t = kernels(until);
    return wait(condition, lock, &t);
}

int sem_timedwait(sem_t *semaphore, const struct timespec *until) {
    static int (*wait)(sem_t *, const struct timespec *);
    if (!wait) *(void **)&wait = dlsym(RTLD_NEXT, "sem_timedwait");
    struct timespec t = kernels(until);
    return wait(semaphore, &t);
}
