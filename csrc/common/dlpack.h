// What a DLPack capsule holds, as https://dmlc.github.io/dlpack defines it: version 1 and the unversioned form before.
#pragma once

#include <cstdint>

namespace dlpack {

constexpr int32_t kCPU = 1; // type of the device that is the host's memory

struct device {
    int32_t type, id;
};

struct data_type {
    uint8_t code, bits;
    uint16_t lanes;
};

struct tensor {
    void *data;
    dlpack::device device;
    int32_t ndim;
    data_type dtype;
    int64_t *shape;
    int64_t *strides; // in elements; null: dense
    uint64_t byte_offset;
};

struct managed { // capsule "dltensor"
    dlpack::tensor tensor;
    void *context;
    void (*deleter)(managed *);
};

constexpr uint64_t kReadOnly = 1;

struct managed_versioned { // capsule "dltensor_versioned"
    struct {
        uint32_t major, minor;
    } version;
    void *context;
    void (*deleter)(managed_versioned *);
    uint64_t flags;
    dlpack::tensor tensor;
};

} // namespace dlpack
