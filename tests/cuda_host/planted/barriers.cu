// Bugs with barriers, each beside its repair: planted_*(broken, in, out).
#include "../../../csrc/common/cuda_mma.cuh"

using namespace lt_cuda;

namespace {

constexpr int kThreads = 64;

// out is `in` backwards. Broken: no barrier between the writes and the reads of others' elements.
__global__ void missing_barrier_kernel(int broken, const float *in, float *out) {
    LT_SHARED(float[kThreads], tile);
    tile[threadIdx.x] = in[threadIdx.x];
    if (!broken)
        __syncthreads();
    out[threadIdx.x] = tile[kThreads - 1 - threadIdx.x];
}

// Two rounds through one tile. Broken: the second writes while others may still read the first.
__global__ void missing_second_barrier_kernel(int broken, const float *in, float *out) {
    LT_SHARED(float[kThreads], tile);
    float total = 0;
    for (int round = 0; round < 2; ++round) {
        tile[threadIdx.x] = in[threadIdx.x] + (float)round;
        __syncthreads();
        total += tile[kThreads - 1 - threadIdx.x];
        if (!broken)
            __syncthreads();
    }
    out[threadIdx.x] = total;
}

// Broken: a part of the threads skips the barrier.
__global__ void divergent_barrier_kernel(int broken, const float *in, float *out) {
    out[threadIdx.x] = in[threadIdx.x];
    if (!broken || threadIdx.x < 40)
        __syncthreads();
}

// Broken: a part of the threads returns before the barrier.
__global__ void early_return_kernel(int broken, const float *in, float *out) {
    if (broken && threadIdx.x == 5)
        return;
    __syncthreads();
    out[threadIdx.x] = in[threadIdx.x];
}

// Broken: two barriers that are not one.
__global__ void two_barriers_kernel(int broken, const float *in, float *out) {
    out[threadIdx.x] = in[threadIdx.x];
    if (broken && threadIdx.x % 2)
        __syncthreads();
    else
        __syncthreads();
}

// Lanes pass values to their neighbours through shared memory. Broken: a shuffle orders no memory.
__global__ void missing_syncwarp_kernel(int broken, const float *in, float *out) {
    LT_SHARED(float[kThreads], tile);
    tile[threadIdx.x] = in[threadIdx.x];
    if (broken)
        (void)__shfl_sync(kAllLanes, 0, 0);
    else
        __syncwarp();
    out[threadIdx.x] = tile[threadIdx.x ^ 1];
}

// Broken: every block writes the same element.
__global__ void blocks_write_one_element_kernel(int broken, const float *in, float *out) {
    if (threadIdx.x == 0)
        out[broken ? 0 : blockIdx.x] = in[0];
}

// Broken: a block reads what another writes in the same launch.
__global__ void blocks_read_each_other_kernel(int broken, const float *in, float *out) {
    if (threadIdx.x == 0)
        out[blockIdx.x] = broken && blockIdx.x ? out[blockIdx.x - 1] : in[0];
}

// Broken: the copy is used before it is waited for.
__global__ void missing_wait_kernel(int broken, const float *in, float *out) {
    LT_SHARED(float[kThreads], tile);
    if (threadIdx.x < kThreads / 4)
        cp_async_16(&tile[4 * threadIdx.x], in + 4 * threadIdx.x, true);
    cp_async_commit();
    if (!broken)
        cp_async_wait<0>();
    __syncthreads();
    out[threadIdx.x] = tile[threadIdx.x];
    __syncthreads();
    cp_async_wait<0>();
}

// Broken: it waits for all but the last commit, and the copy is in the last.
__global__ void wait_for_too_few_kernel(int broken, const float *in, float *out) {
    LT_SHARED(float[2][4], tile);
    for (int i = 0; i < 2; ++i) {
        if (threadIdx.x == 0)
            cp_async_16(tile[i], in + 4 * i, true);
        cp_async_commit();
    }
    if (broken)
        cp_async_wait<1>();
    else
        cp_async_wait<0>();
    __syncthreads();
    if (threadIdx.x < 8)
        out[threadIdx.x] = tile[threadIdx.x / 4][threadIdx.x % 4];
    __syncthreads();
    cp_async_wait<0>();
}

// Broken: copies are still under way when the kernel ends.
__global__ void copy_at_the_end_kernel(int broken, const float *in, float *out) {
    LT_SHARED(float[4], tile);
    out[threadIdx.x] = in[threadIdx.x];
    if (threadIdx.x == 0)
        cp_async_16(tile, in, true);
    cp_async_commit();
    if (!broken)
        cp_async_wait<0>();
}

} // namespace

#define PLANTED(name, blocks)                                                        \
    extern "C" LT_API int planted_##name(int broken, const float *in, float *out) {  \
        return launch(name##_kernel, blocks, kThreads, 0, nullptr, broken, in, out); \
    }
PLANTED(missing_barrier, 1)
PLANTED(missing_second_barrier, 1)
PLANTED(divergent_barrier, 1)
PLANTED(early_return, 1)
PLANTED(two_barriers, 1)
PLANTED(missing_syncwarp, 1)
PLANTED(blocks_write_one_element, 3)
PLANTED(blocks_read_each_other, 3)
PLANTED(missing_wait, 1)
PLANTED(wait_for_too_few, 1)
PLANTED(copy_at_the_end, 1)
