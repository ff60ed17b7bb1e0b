// Accesses that are wrong wherever the threads run, each beside its repair: planted_*(broken, in, out), 64 floats each.
#include "../../../csrc/common/cuda_kernel.cuh"

using namespace lt_cuda;

namespace {

constexpr int kThreads = 64;

__global__ void read_past_the_end_kernel(int broken, const float *in, float *out) {
    out[threadIdx.x] = in[threadIdx.x + (broken ? 1 : 0)];
}

__global__ void write_past_the_end_kernel(int broken, const float *in, float *out) {
    out[threadIdx.x + (broken ? 1 : 0)] = in[threadIdx.x];
}

__global__ void write_past_the_tile_kernel(int broken, const float *in, float *out) {
    LT_SHARED(float[kThreads], tile);
    float *end = tile + kThreads; // hides the bound from the compiler
    end[(int)threadIdx.x - kThreads + (broken ? 1 : 0)] = in[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = in[threadIdx.x];
}

__global__ void read_before_dynamic_memory_kernel(int broken, const float *in, float *out) {
    LT_DYNAMIC_SHARED(bytes);
    float *tile = (float *)bytes;
    tile[threadIdx.x] = in[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = tile[(int)threadIdx.x - (broken && threadIdx.x == 0 ? 1 : 0)];
}

// Nobody wrote the upper half. Broken: it is used.
__global__ void uninitialised_tile_kernel(int broken, const float *in, float *out) {
    LT_SHARED(float[2 * kThreads], tile);
    tile[threadIdx.x] = in[threadIdx.x];
    out[threadIdx.x] = tile[threadIdx.x + (broken ? kThreads : 0)];
}

__global__ void misaligned_vector_kernel(int broken, const float *in, float *out) {
    if (threadIdx.x < 4)
        store_vec(out + 4 * threadIdx.x, load_vec<4>(in + 4 * threadIdx.x + (broken ? 1 : 0)));
}

__global__ void misaligned_float4_kernel(int broken, const float *in, float *out) {
    if (threadIdx.x < 4)
        *(float4 *)(out + 4 * threadIdx.x) = *(const float4 *)(in + 4 * threadIdx.x + (broken ? 1 : 0));
}

__global__ void too_much_static_memory_kernel(int broken, const float *in, float *out) {
    out[threadIdx.x] = in[threadIdx.x];
    if (broken) {
        LT_SHARED(float[13 << 10], tile);
        tile[threadIdx.x] = 0;
    }
}

// The traffic of this one is known: 64 floats read once by each of two blocks, the first again; 2 x 64 written.
__global__ void read_twice_kernel(int, const float *in, float *out) {
    float total = in[threadIdx.x] + in[0];
    __syncthreads();
    out[blockIdx.x * kThreads + threadIdx.x] = total;
}

} // namespace

#define PLANTED(name, blocks, dynamic)                                                     \
    extern "C" LT_API int planted_##name(int broken, const float *in, float *out) {        \
        return launch(name##_kernel, blocks, kThreads, dynamic, nullptr, broken, in, out); \
    }
PLANTED(read_past_the_end, 1, 0)
PLANTED(write_past_the_end, 1, 0)
PLANTED(write_past_the_tile, 1, 0)
PLANTED(read_before_dynamic_memory, 1, kThreads * sizeof(float))
PLANTED(uninitialised_tile, 1, 0)
PLANTED(misaligned_vector, 1, 0)
PLANTED(misaligned_float4, 1, 0)
PLANTED(too_much_static_memory, 1, 0)
PLANTED(read_twice, 2, 0)

extern "C" LT_API int planted_grid_too_large(int broken, const float *in, float *out) {
    return launch(read_twice_kernel, dim3(1, broken ? 65536 : 1), kThreads, 0, nullptr, broken, in, out);
}
