// Runs the kernels on a CPU, for checking them: a thread of a block is a coroutine, one block after another.
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>
#include <csetjmp>
#include <ucontext.h>

struct Place { unsigned x, y, z; };
static Place threadIdx, blockIdx;
struct alignas(16) ulonglong2 { unsigned long long x, y; };
static inline unsigned int __umulhi(unsigned int a, unsigned int b) { return (unsigned long long)a * b >> 32; }
static inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)((unsigned __int128)a * b >> 64);
}
static inline unsigned long long atomicAdd(unsigned long long* p, unsigned long long x) {
    unsigned long long old = *p;
    *p += x;
    return old;
}
static unsigned long long* shared_words;
static void leave();
#define SHARED(name) u64* name = shared_words
#define __global__
#define __device__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __syncthreads() leave()
KERNELS_TEXT

const int MOST_THREADS = 512, STACK = 1 << 16;
static jmp_buf outside, inside[MOST_THREADS];
static bool begun[MOST_THREADS], ended[MOST_THREADS];
static int current;
static void (*chosen)(void**);
static void** arguments;
static __attribute__((noinline)) void leave() {
    if (!_setjmp(inside[current])) _longjmp(outside, 1);
}
static void entered() {
    for (;;) {  // a thread of one block after another
        chosen(arguments);
        ended[current] = true;
        leave();
    }
}
static __attribute__((noinline)) void resume(char* stack) {
    static ucontext_t first;
    if (_setjmp(outside)) return;
    if (begun[current]) _longjmp(inside[current], 1);
    begun[current] = true;
    getcontext(&first);
    first.uc_stack = {stack, 0, (size_t)STACK};
    makecontext(&first, entered, 0);
    setcontext(&first);
}

template <class... A, size_t... I>
static void call(void (*f)(A...), void** a, std::index_sequence<I...>) { f(*(A*)a[I]...); }
template <class... A>
static void apply(void (*f)(A...), void** a) { call(f, a, std::index_sequence_for<A...>{}); }

// order: 0 threads in their order, 1 backwards. Returns 1 for an unknown kernel, 2 where some threads wait for others
// that have ended, 3 where shared memory is written past its end.
extern "C" int emulate(
    const char* name, unsigned blocks, unsigned items, int threads, size_t bytes, void** given, int order) {
    static char* stacks = (char*)malloc((size_t)STACK * MOST_THREADS);
#define KERNEL_OF(k) if (!strcmp(name, #k)) chosen = [](void** a) { apply(k, a); }; else
    KERNELS_LIST return 1;
    const unsigned long long guard = 0x0123456789ABCDEFull;
    std::vector<unsigned long long> room(bytes / 8 + 64, guard);
    shared_words = room.data();
    arguments = given;
    for (blockIdx.y = 0; blockIdx.y < items; blockIdx.y++)
        for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++) {
            for (int t = 0; t < threads; t++) ended[t] = false;
            for (int left = threads; left;) {
                const int before = left;
                for (int k = 0; k < threads; k++) {
                    const int t = order ? threads - 1 - k : k;
                    current = t, threadIdx.x = t;
                    resume(stacks + (size_t)t * STACK);
                    left -= ended[t];
                }
                if (left && left != before) return 2;
            }
        }
    for (size_t i = bytes / 8; i < room.size(); i++)
        if (room[i] != guard) return 3;
    return 0;
}
