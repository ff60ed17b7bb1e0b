// Tensor cores and asynchronous copies, with the fragment layouts of the PTX manual ("Matrix fragments for mma").
// In a fragment, lane l belongs to group g = l / 4 and is member t = l % 4 of it.
#include "block.h"

#include "cuda_bf16.h"
#include "cuda_fp16.h"

namespace lt_host {

struct Product {
    float *d;
    const uint32_t *a, *b;
};

// d += a * b, for a [16, K] and b [K, 8], summed in the order of k.
template <int K> static void multiply(void *const operands[32], const float (&a)[16][K], const float (&b)[K][8]) {
    float d[16][8];
    for (int l = 0; l < 32; ++l)
        for (int i = 0; i < 4; ++i)
            d[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2] = ((Product *)operands[l])->d[i];
    for (int m = 0; m < 16; ++m)
        for (int k = 0; k < K; ++k)
            for (int n = 0; n < 8; ++n)
                d[m][n] += a[m][k] * b[k][n];
    for (int l = 0; l < 32; ++l)
        for (int i = 0; i < 4; ++i)
            ((Product *)operands[l])->d[i] = d[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2];
}

static float element(Element type, uint32_t pair, int i) {
    const unsigned short bits = (unsigned short)(pair >> 16 * i);
    return type == Element::BF16 ? __bfloat162float(__ushort_as_bfloat16(bits)) : __half2float(__ushort_as_half(bits));
}

template <Element TYPE> static void complete_16816(void *const operands[32], unsigned) {
    float a[16][16], b[16][8];
    for (int l = 0; l < 32; ++l) {
        const Product &p = *(const Product *)operands[l];
        const int g = l / 4, t = l % 4;
        for (int i = 0; i < 2; ++i) {
            for (int r = 0; r < 4; ++r)
                a[g + r % 2 * 8][2 * t + i + r / 2 * 8] = element(TYPE, p.a[r], i);
            for (int r = 0; r < 2; ++r)
                b[2 * t + i + r * 8][g] = element(TYPE, p.b[r], i);
        }
    }
    multiply(operands, a, b);
}

// The tensor core reads the upper 19 bits of each float.
static float tf32(uint32_t bits) { return __uint_as_float(bits & 0xffffe000u); }

static void complete_1688(void *const operands[32], unsigned) {
    float a[16][8], b[8][8];
    for (int l = 0; l < 32; ++l) {
        const Product &p = *(const Product *)operands[l];
        const int g = l / 4, t = l % 4;
        for (int r = 0; r < 4; ++r)
            a[g + r % 2 * 8][t + r / 2 * 4] = tf32(p.a[r]);
        for (int r = 0; r < 2; ++r)
            b[t + r * 4][g] = tf32(p.b[r]);
    }
    multiply(operands, a, b);
}

constexpr unsigned kAll = 0xffffffffu;

void mma_16816(Element type, float d[4], const uint32_t a[4], const uint32_t b[2], Place place) {
    Product operands = {d, a, b};
    if (type == Element::BF16)
        collective("mma_bf16_16816", kAll, place, &operands, complete_16816<Element::BF16>);
    else
        collective("mma_f16_16816", kAll, place, &operands, complete_16816<Element::F16>);
}

void mma_tf32_1688(float d[4], const uint32_t a[4], const uint32_t b[2], Place place) {
    Product operands = {d, a, b};
    collective("mma_tf32_1688", kAll, place, &operands, complete_1688);
}

// ---- ldmatrix: lane 8 m + i gives the address of row i of matrix m; a row is eight 16-bit elements ------------------

struct Load {
    uint32_t *r;
    uint16_t row[8];
};

template <int MATRICES, bool TRANSPOSED> static void distribute(void *const operands[32], unsigned) {
    for (int l = 0; l < 32; ++l)
        for (int m = 0; m < MATRICES; ++m) {
            uint32_t pair = 0;
            for (int i = 0; i < 2; ++i) {
                const int row = TRANSPOSED ? l % 4 * 2 + i : l / 4, column = TRANSPOSED ? l / 4 : l % 4 * 2 + i;
                pair |= (uint32_t)((const Load *)operands[m * 8 + row])->row[column] << 16 * i;
            }
            ((Load *)operands[l])->r[m] = pair;
        }
}

void ldmatrix(const char *name, int matrices, bool transposed, uint32_t *r, const void *shared, Place place) {
    Load operands = {r, {}};
    if (lane() < 8 * matrices) {
        if ((uintptr_t)shared % 16)
            misaligned(shared, 16);
        if (!shared_range(shared, 16))
            fail("%s reads 16 bytes at %p, which are not in one shared variable", name, shared);
        trace_read(shared, 16);
        memcpy(operands.row, shared, 16);
    }
    Complete complete = transposed ? distribute<2, true> : distribute<2, false>;
    if (matrices == 4)
        complete = transposed ? distribute<4, true> : distribute<4, false>;
    collective(name, kAll, place, &operands, complete);
}

// ---- cp.async: the bytes arrive at the last moment that the program allows, and until then the target holds NaN -----

void cp_async_16(void *shared, const void *global, bool valid) {
    if ((uintptr_t)shared % 16)
        misaligned(shared, 16);
    if (valid && (uintptr_t)global % 16)
        misaligned(global, 16);
    if (!shared_range(shared, 16))
        fail("cp.async writes 16 bytes at %p, which are not in one shared variable", shared);
    Thread &self = *block.self;
    trace_write(shared, 16);
    trace_in_flight(shared, 16, true);
    memset(shared, kPoison, 16);
    if (valid)
        trace_read(global, 16);
    self.copies.push_back({(unsigned char *)shared, (const unsigned char *)global, valid, self.group});
}

void cp_async_commit() { ++block.self->group; }

void cp_async_wait(int pending) {
    Thread &self = *block.self;
    size_t arrived = 0;
    for (const Copy &copy : self.copies) {
        if (copy.group >= self.group - pending)
            break;
        trace_in_flight(copy.to, 16, false);
        trace_write(copy.to, 16);
        if (copy.valid)
            memcpy(copy.to, copy.from, 16);
        else
            memset(copy.to, 0, 16);
        ++arrived;
    }
    self.copies.erase(self.copies.begin(), self.copies.begin() + (long)arrived);
}

} // namespace lt_host
