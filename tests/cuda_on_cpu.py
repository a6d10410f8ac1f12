"""
A CUDA driver that runs kernels on the CPU: the kernel's own text, compiled by g++ behind a shim, launched through the same
Python code as on a GPU. It models what the weighting kernel uses and no more: every thread is a fiber, __syncthreads and
shuffles wait for all threads of the block (and fail if one never comes), shared memory is kept per block, and a limited
number of blocks, started in a scrambled order, run side by side, so that blocks waiting for each other are tested as well.
What it cannot show: speed, memory ordering, alignment faults (checked here by assertion), and the compiler for the GPU.
"""
import ctypes
import hashlib
import subprocess
from pathlib import Path

HEADERS = r"""
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>
"""
SHIM = r"""
struct Dim { int x; };
struct Fiber { ucontext_t context; int block, thread; bool done; };
struct Block { int index, arrived, generation, left; float* slots; char* shared; };
static Dim threadIdx, blockIdx;
static Fiber* now;
static Block* here;
static ucontext_t scheduler;
static int threads;
static bool moved;
static void yield_() { swapcontext(&now->context, &scheduler); }
static void __syncthreads() {
    Block* b = here;
    int g = b->generation;
    moved = true;
    if (++b->arrived == threads) { b->arrived = 0; b->generation++; } else while (b->generation == g) yield_();
}
static float __shfl_xor_sync(unsigned, float v, int o) {
    int t = threadIdx.x;
    if ((t ^ o) / 32 != t / 32) { fprintf(stderr, "shuffle across warps\n"); abort(); }
    here->slots[t] = v;
    __syncthreads();
    v = here->slots[t ^ o];
    __syncthreads();
    return v;
}
static int atomicAdd(int* p, int v) { int old = *p; *p += v; if (v) moved = true; yield_(); return old; }
static void __threadfence() {}
static float __uint_as_float(unsigned u) { float f; memcpy(&f, &u, 4); return f; }
static unsigned __float_as_uint(float f) { unsigned u; memcpy(&u, &f, 4); return u; }
#ifdef FP16
static float half_up(unsigned short v) { _Float16 h; memcpy(&h, &v, 2); return h; }
static unsigned short half_down(float v) { _Float16 h = v; unsigned short u; memcpy(&u, &h, 2); return u; }
#endif
#define __device__ static
#define __global__
#define __launch_bounds__(n)
#define __shared__ static __attribute__((section("shared_memory")))
__attribute__((section("shared_memory"))) static int keep_section = 1;
extern char __start_shared_memory[], __stop_shared_memory[];
"""
RUN = r"""
static void** parameters;
static void entry() {
    void** p = parameters;
    weighted_score_gradient(*(Pack**)p[0], *(Pack**)p[1], *(Pack**)p[2], *(float**)p[3], *(Pack**)p[4], *(float**)p[5],
                            *(int*)p[6], *(int**)p[7], *(float**)p[8]);
    now->done = true;
    swapcontext(&now->context, &scheduler);
}
extern "C" int run(int blocks, int n, void** p, int resident) {     // 1: all fibers wait for something that never comes
    const int stack = 32768, shared = __stop_shared_memory - __start_shared_memory;
    for (int i = 0; i < 5; i++) if (i != 3 && *(size_t*)p[i] % sizeof(Pack)) return 2;                 // what a GPU would fault on
    threads = n, parameters = p;
    Block* block = (Block*)calloc(resident, sizeof(Block));
    Fiber* fiber = (Fiber*)calloc((size_t)resident * n, sizeof(Fiber));
    char* stacks = (char*)malloc((size_t)resident * n * stack);
    int started = 0, finished = 0, stale = 0;
    while (finished < blocks) {
        moved = false;
        for (int s = 0; s < resident; s++) {
            Block* b = block + s;
            if (!b->left) {                                         // a free place: the next block, in a scrambled order
                if (started == blocks) continue;
                if (!b->slots) b->slots = (float*)malloc(n * 4), b->shared = (char*)calloc(1, shared);
                b->index = blocks % 7 ? (int)(started * 7LL % blocks) : blocks - 1 - started;
                started++, b->left = n, b->arrived = b->generation = 0, moved = true;
                for (int t = 0; t < n; t++) {
                    Fiber* f = fiber + (size_t)s * n + t;
                    getcontext(&f->context);
                    f->context.uc_stack.ss_sp = stacks + ((size_t)s * n + t) * stack;
                    f->context.uc_stack.ss_size = stack, f->thread = t, f->done = false;
                    makecontext(&f->context, entry, 0);
                }
            }
            here = b, blockIdx.x = b->index;
            memcpy(__start_shared_memory, b->shared, shared);
            for (int t = 0; t < n; t++) {
                Fiber* f = fiber + (size_t)s * n + t;
                if (f->done) continue;
                now = f, threadIdx.x = t;
                swapcontext(&scheduler, &f->context);
                if (f->done) b->left--, moved = true;
            }
            memcpy(b->shared, __start_shared_memory, shared);
            if (!b->left) finished++;
        }
        stale = moved ? 0 : stale + 1;
        if (stale > 9) return 1;
    }
    for (int s = 0; s < resident; s++) free(block[s].slots), free(block[s].shared);
    free(block), free(fiber), free(stacks);
    return 0;
}
"""


CDLL = ctypes.CDLL                                  # the real one: a test puts this driver in its place


class Driver:
    """cuModuleLoadData, cuModuleGetFunction and cuLaunchKernel; `resident` blocks run at a time. g++ writes to `folder`."""

    def __init__(self, folder, resident=16):
        self.folder, self.resident, self.launches, self.modules = Path(folder), resident, [], {}

    def cuModuleLoadData(self, module, source):
        text = source.decode()
        for asm, plain in (('asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v))', "f = half_up(v)"),
                           ('asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(v))', "h = half_down(v)")):
            assert asm in text
            text = text.replace(asm, plain)
        defines, kernel = text.split("\n#if defined(BF16)")
        path = self.folder / hashlib.sha256(source).hexdigest()[:16]
        if not path.with_suffix(".so").exists():
            path.with_suffix(".cpp").write_text(f"{HEADERS}\n{defines}\n{SHIM}\n#if defined(BF16){kernel}\n{RUN}")
            subprocess.run(["g++", "-O1", "-D_GLIBCXX_INCLUDE_NEXT_C_HEADERS", "-ffp-contract=off", "-w", "-shared", "-fPIC",
                            "-o", path.with_suffix(".so"), path.with_suffix(".cpp")], check=True)
        self.modules[len(self.modules) + 1] = CDLL(str(path.with_suffix(".so")))
        module._obj.value = len(self.modules)
        return 0

    def cuModuleGetFunction(self, function, module, name):
        function._obj.value = module.value
        return 0 if name == b"weighted_score_gradient" else 500

    def cuLaunchKernel(self, function, gx, gy, gz, bx, by, bz, shared, stream, parameters, extra):
        assert (gy, gz, by, bz, shared, extra) == (1, 1, 1, 1, 0, None) and 0 < gx < 2**31 and bx % 32 == 0 and bx <= 1024
        self.launches.append((gx, bx))
        return self.modules[function.value].run(gx, bx, parameters, min(self.resident, gx))
