// CUDA on a processor: every thread of a block is a fiber, and what threads do together is where fibers switch.
// It says nothing about speed or about the order of memory accesses.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>

#define __global__
#define __device__
#define __shared__ static
#define __constant__ static const
#define __grid_constant__
#define __launch_bounds__(n)
using std::max, std::min;

struct Index { unsigned x; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace fibers {
constexpr int LIMIT = 1024, STACK_BYTES = 64 << 10;
struct Fiber { ucontext_t begin; jmp_buf place; uint64_t given; int waits_for; bool has_begun, is_done; };
inline Fiber all[LIMIT];
inline jmp_buf home;
inline int current;
// Several devices launch from threads of their own, and share the fibers, in whichever library their kernels are.
inline std::mutex launching;
inline void (*body)();
inline std::unique_ptr<char[]> stacks(new char[LIMIT * STACK_BYTES]);

// Goes on when the others of the warp (1) or of the block (2) have come to where they meet.
inline void meet(int kind) {
    all[current].waits_for = kind;
    if (!_setjmp(all[current].place)) _longjmp(home, 1);
}
// A lane that has ended when another one gives something to its warp has left it too early.
inline void give(const void* value, size_t nbytes) {
    for (int i = current / 32 * 32; i < current / 32 * 32 + 32; i++)
        if (all[i].is_done) std::fprintf(stderr, "a lane has left its warp\n"), std::abort();
    std::memcpy(&all[current].given, value, nbytes);
    meet(1);
}
inline void enter() {
    body();
    all[current].is_done = true;
    _longjmp(home, 1);
}
// Goes on with a fiber until it meets others or ends. A jump changes stacks without a system call.
inline void step(int i) {
    current = i;
    if (_setjmp(home)) return;
    if (all[i].has_begun) _longjmp(all[i].place, 1);
    all[i].has_begun = true;
    setcontext(&all[i].begin);
}
// Runs fibers one after the other, each up to where it meets others, until all have ended.
inline void run(int threads, void (*what)()) {
    body = what;
    for (int i = 0; i < threads; i++) {
        Fiber& fiber = all[i];
        fiber.has_begun = fiber.is_done = false, fiber.waits_for = 0;
        getcontext(&fiber.begin);
        fiber.begin.uc_stack = {stacks.get() + i * STACK_BYTES, 0, STACK_BYTES};
        makecontext(&fiber.begin, enter, 0);
    }
    for (int left = threads; left;) {
        left = 0;
        bool has_moved = false, is_block_at_barrier = true;
        for (int warp = 0; warp < threads; warp += 32) {
            const auto goes_on = [&](int i) { return !all[i].is_done && all[i].waits_for != 2; };
            // A warp goes from one meeting to the next as long as none of it waits for the block.
            for (bool again = true; again;) {
                again = false;
                for (int i = warp; i < warp + 32; i++)
                    if (goes_on(i)) step(i), again = has_moved = true;
            }
            for (int i = warp; i < warp + 32; i++) left += !all[i].is_done;
        }
        for (int i = 0; i < threads; i++) is_block_at_barrier &= all[i].is_done || all[i].waits_for == 2;
        if (is_block_at_barrier)
            for (int i = 0; i < threads; i++) all[i].waits_for = 0;
        else if (!has_moved) std::fprintf(stderr, "threads wait for each other\n"), std::abort();
    }
}
template <class T>
T exchange(T value, int from) {
    give(&value, sizeof(T));
    T other;
    std::memcpy(&other, &all[current / 32 * 32 + from].given, sizeof(T));
    meet(1);
    return other;
}
}  // namespace fibers

inline Index threadIdx_() { return {(unsigned)fibers::current}; }
inline Index blockIdx;
#define threadIdx threadIdx_()

template <class T> T __shfl_sync(unsigned, T value, int lane) { return fibers::exchange(value, lane & 31); }
template <class T> T __shfl_xor_sync(unsigned, T value, int mask) {
    return fibers::exchange(value, (fibers::current % 32) ^ mask);
}
inline unsigned __ballot_sync(unsigned, bool vote) {
    fibers::give(&vote, sizeof(vote));
    unsigned votes = 0;
    for (int i = 0; i < 32; i++) votes |= (unsigned)(fibers::all[fibers::current / 32 * 32 + i].given & 1) << i;
    fibers::meet(1);
    return votes;
}
inline bool __any_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) != 0; }
inline void __syncthreads() { fibers::meet(2); }
template <class T> T atomicAdd(T* at, T value) { const T old = *at; *at += value; return old; }
template <class T> T atomicMax(T* at, T value) { const T old = *at; *at = max(old, value); return old; }
inline unsigned __float_as_uint(float value) { unsigned bits; std::memcpy(&bits, &value, 4); return bits; }
inline float __uint_as_float(unsigned bits) { float value; std::memcpy(&value, &bits, 4); return value; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
