// The product of a few rows of x with a quantised weight, read as it is stored: what nf4/cuda.cu and int8/cuda.cu
// share.
//
// A warp has kRows rows of the weight; a lane takes PER_LANE weights (16 bytes) of each at a time, so that a pass of
// the block covers 32 * PER_LANE columns. x is staged for them in shared memory, in fp32 and in the order of the lanes:
// four neighbouring elements of every lane, then the next four, so that each lane's 16-byte read is beside the next.
#pragma once

#include "cuda_kernel.cuh"

namespace lt_cuda {

constexpr int kLinearWarps = 4, kLinearThreads = 32 * kLinearWarps, kLinearRows = 4;

// Columns [first, first + 32 * PER_LANE) of TOKENS rows of x, zero beyond its edges.
template <class T, int TOKENS, int PER_LANE>
__device__ void stage_x(const T *x, int64_t x_stride, int64_t tokens, int64_t first, int64_t inputs,
                        float (&staged)[TOKENS][PER_LANE / 4][33][4]) {
    for (int i = threadIdx.x; i < TOKENS * 32 * PER_LANE; i += kLinearThreads) {
        const int t = i / (32 * PER_LANE), k = i % (32 * PER_LANE);
        const bool inside = t < tokens && first + k < inputs;
        staged[t][k % PER_LANE / 4][k / PER_LANE][k % 4] = inside ? widen(x[t * x_stride + first + k]) : 0.0f;
    }
}

// y [tokens, outputs] = x W^T + bias. `Weight` is the storage, by value, with:
//   kPerLane                          weights in 16 bytes
//   const float *prepare()            a table in shared memory for value(); read after a barrier
//   Chunk load(row, column, inputs)   16 bytes of codes and their scale; zero where the column is beyond `inputs`
//   float value(table, chunk, i)      the i-th weight, not yet scaled
template <class Weight, class T, int TOKENS>
__device__ void linear_tile(const Weight &weight, const T *x, int64_t x_stride, const T *bias, T *y, int64_t y_stride,
                            int64_t tokens, int64_t inputs, int64_t outputs) {
    x += blockIdx.y * TOKENS * x_stride;
    y += blockIdx.y * TOKENS * y_stride;
    tokens -= (int64_t)blockIdx.y * TOKENS;
    constexpr int kPerLane = Weight::kPerLane, kColumns = 32 * kPerLane;
    LT_SHARED(float[TOKENS][kPerLane / 4][33][4], staged); // 33: neighbours are written to different banks
    const float *table = weight.prepare();
    const int lane = threadIdx.x % 32;
    const int64_t row = ((int64_t)blockIdx.x * kLinearWarps + threadIdx.x / 32) * kLinearRows;
    float total[kLinearRows][TOKENS] = {};
    for (int64_t first = 0; first < inputs; first += kColumns) {
        typename Weight::Chunk chunk[kLinearRows];
#pragma unroll
        for (int r = 0; r < kLinearRows; ++r) // all under way before anybody waits
            chunk[r] = weight.load(row + r < outputs ? row + r : outputs - 1, first + lane * kPerLane, inputs);
        __syncthreads(); // the readers of the last pass are done
        stage_x<T, TOKENS, kPerLane>(x, x_stride, tokens, first, inputs, staged);
        __syncthreads();
        float sums[kLinearRows][TOKENS] = {};
#pragma unroll
        for (int j = 0; j < kPerLane / 4; ++j) {
            float values[kLinearRows][4];
#pragma unroll
            for (int r = 0; r < kLinearRows; ++r)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    values[r][i] = weight.value(table, chunk[r], 4 * j + i);
#pragma unroll
            for (int t = 0; t < TOKENS; ++t) {
                const Vec<float, 4> part = load_vec<4>(staged[t][j][lane]);
#pragma unroll
                for (int r = 0; r < kLinearRows; ++r)
#pragma unroll
                    for (int i = 0; i < 4; ++i)
                        sums[r][t] += values[r][i] * part[i];
            }
        }
#pragma unroll
        for (int r = 0; r < kLinearRows; ++r)
#pragma unroll
            for (int t = 0; t < TOKENS; ++t)
                total[r][t] += sums[r][t] * chunk[r].scale;
    }
#pragma unroll
    for (int r = 0; r < kLinearRows; ++r)
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) {
            const float sum = warp_sum(total[r][t]);
            if (lane == 0 && row + r < outputs && t < tokens)
                narrow(sum + (bias ? widen(bias[row + r]) : 0.0f), y + t * y_stride + row + r);
        }
}

// 16 bytes from `codes`, in one access where `aligned`, else those that are `inside`.
__device__ inline Vec<uint32_t, 4> load_codes(const void *codes, bool aligned, int64_t inside) {
    if (aligned && inside >= 16)
        return load_vec<4>((const uint32_t *)codes);
    Vec<uint32_t, 4> result = {};
#pragma unroll
    for (int i = 0; i < 16; ++i)
        if (i < inside)
            result[i / 4] |= (uint32_t)((const uint8_t *)codes)[i] << 8 * (i % 4);
    return result;
}

// launch(kernel of one row of x or of four, grid): a block has kLinearWarps * kLinearRows outputs.
template <class F> int launch_linear(int64_t tokens, int64_t outputs, F launch) {
    const unsigned across = (unsigned)ceil_div(outputs, (int64_t)(kLinearWarps * kLinearRows));
    if (tokens == 1)
        return launch(std::integral_constant<int, 1>{}, dim3(across));
    return launch(std::integral_constant<int, 4>{}, dim3(across, (unsigned)ceil_div(tokens, (int64_t)4)));
}

} // namespace lt_cuda
