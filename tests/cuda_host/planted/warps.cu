// Shuffles and votes: bugs beside their repairs, and every form against what the manual says.
#include "../../../csrc/common/cuda_kernel.cuh"

using namespace lt_cuda;

namespace {

constexpr int kThreads = 64;

// Broken: the mask names a lane that has returned.
__global__ void absent_lane_kernel(int broken, const float *in, float *out) {
    if (broken && threadIdx.x == 7)
        return;
    out[threadIdx.x] = __shfl_sync(kAllLanes, in[threadIdx.x], 3);
}

// Broken: one lane waits at a barrier instead.
__global__ void lane_at_a_barrier_kernel(int broken, const float *in, float *out) {
    if (broken && threadIdx.x == 7)
        __syncthreads();
    out[threadIdx.x] = __shfl_sync(kAllLanes, in[threadIdx.x], 3);
    if (!broken || threadIdx.x != 7)
        __syncthreads();
}

// Broken: the lanes disagree about who takes part.
__global__ void masks_differ_kernel(int broken, const float *in, float *out) {
    const unsigned half = threadIdx.x % 32 < 16 ? 0x0000ffffu : 0xffff0000u;
    const unsigned mask = broken && threadIdx.x % 32 < 16 ? kAllLanes : half;
    out[threadIdx.x] = __shfl_xor_sync(mask, in[threadIdx.x], 1);
}

// Broken: it reads from a lane that the mask leaves out.
__global__ void source_outside_mask_kernel(int broken, const float *in, float *out) {
    out[threadIdx.x] = in[threadIdx.x];
    if (threadIdx.x < 16)
        out[threadIdx.x] = __shfl_sync(0x0000ffffu, in[threadIdx.x], broken ? 16 : 15);
}

// Broken: the caller is not in its own mask.
__global__ void caller_outside_mask_kernel(int broken, const float *in, float *out) {
    out[threadIdx.x] = __shfl_xor_sync(broken ? 0x7fffffffu : kAllLanes, in[threadIdx.x], 1);
}

// One row of 32 results for each form; see test_shuffles_and_votes.
__global__ void forms_kernel(int, const float *in, float *out) {
    const int lane = threadIdx.x;
    const float x = in[lane];
    int row = 0;
    out[32 * row++ + lane] = __shfl_sync(kAllLanes, x, 5);
    out[32 * row++ + lane] = __shfl_sync(kAllLanes, x, lane + 1, 8);
    out[32 * row++ + lane] = __shfl_xor_sync(kAllLanes, x, 12);
    out[32 * row++ + lane] = __shfl_down_sync(kAllLanes, x, 3, 16);
    out[32 * row++ + lane] = __shfl_up_sync(kAllLanes, x, 3, 16);
    out[32 * row++ + lane] = (float)__shfl_sync(kAllLanes, (double)x, 31);
    out[32 * row++ + lane] = (float)__shfl_down_sync(kAllLanes, (long long)lane, 1);
    out[32 * row++ + lane] = (float)__popc(__ballot_sync(kAllLanes, lane < 11));
    out[32 * row++ + lane] = (float)(__any_sync(kAllLanes, lane == 9) + 2 * __all_sync(kAllLanes, lane == 9));
    out[32 * row++ + lane] = warp_sum(x);
    out[32 * row++ + lane] = warp_max(x);
    out[32 * row++ + lane] = block_sum<32>(x);
    out[32 * row++ + lane] = block_max<32>(x);
}

} // namespace

#define PLANTED(name, threads)                                                      \
    extern "C" LT_API int planted_##name(int broken, const float *in, float *out) { \
        return launch(name##_kernel, 1, threads, 0, nullptr, broken, in, out);      \
    }
PLANTED(absent_lane, kThreads)
PLANTED(lane_at_a_barrier, kThreads)
PLANTED(masks_differ, kThreads)
PLANTED(source_outside_mask, kThreads)
PLANTED(caller_outside_mask, kThreads)
PLANTED(forms, 32)
