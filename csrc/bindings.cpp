// Python's view of the C interface: pointers travel as integers, a status other than LT_OK becomes RuntimeError.
// One line per function; shapes and strides are checked by the Python side, which knows the tensors' names.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <dlfcn.h>

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "dlpack.h"
#include "leantune_kernels.h"

namespace py = pybind11;

namespace {

// A pointer parameter is taken as an integer address (0: null); everything else as it is.
template <class P> struct argument {
    typedef P type;
    static P give(P value) { return value; }
};
template <class P> struct argument<P *> {
    typedef uintptr_t type;
    static P *give(uintptr_t value) { return reinterpret_cast<P *>(value); }
};

template <class... P> auto checked(int (*function)(P...)) {
    return [function](typename argument<P>::type... values) {
        int status;
        {
            py::gil_scoped_release unlocked;
            status = function(argument<P>::give(values)...);
        }
        if (status != LT_OK)
            throw std::runtime_error(lt_last_error());
    };
}

// The CUDA library is opened when Python asks for it: the package is complete without. Its functions keep the types
// that the header gives them; where they are is looked up at the first call.
void *cuda_library = nullptr;

void *cuda_symbol(const std::string &name) {
    void *symbol = cuda_library ? dlsym(cuda_library, name.c_str()) : nullptr;
    if (!symbol)
        throw std::runtime_error(name + (cuda_library ? " is not in the CUDA library" : ": no CUDA library is open"));
    return symbol;
}

void open_cuda_library(const std::string &path) {
    void *opened = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!opened)
        throw std::runtime_error(dlerror());
    cuda_library = opened;
}

template <class... P> auto on_cuda(const std::string &name, int (*)(P...)) {
    return [name, from = (void *)nullptr, symbol = (void *)nullptr](typename argument<P>::type... values) mutable {
        if (from != cuda_library || !symbol) {
            symbol = cuda_symbol(name);
            from = cuda_library;
        }
        int status;
        {
            py::gil_scoped_release unlocked;
            status = reinterpret_cast<int (*)(P...)>(symbol)(argument<P>::give(values)...);
        }
        if (status != 0) {
            auto words = reinterpret_cast<const char *(*)(int)>(cuda_symbol("lt_cuda_error_string"));
            throw std::runtime_error(name + ": " + words(status));
        }
    };
}

void set_isa(const std::string &name) {
    if (lt_set_isa(name.c_str()) != LT_OK)
        throw std::invalid_argument(lt_last_error());
}

// The library takes its best level where LEANTUNE_ISA names none that it has; whoever imports the module is told.
void check_isa_of_environment() {
    const char *asked = std::getenv("LEANTUNE_ISA");
    if (asked && lt_set_isa(asked) != LT_OK)
        throw py::import_error("LEANTUNE_ISA=" + std::string(asked) + ": " + lt_last_error() +
                               "; set it to base, avx2 or avx512, or unset it");
}

// (address, shape, strides in elements, type code, bits, device type, writable, capsule) of a DLPack capsule, which is
// only looked into: it stays the caller's, and its memory lives as long as it does. What an unversioned capsule does
// not say counts as "no": it is not writable.
py::tuple look_into_dlpack(const py::object &capsule) {
    const dlpack::tensor *tensor;
    bool writable = false;
    if (PyCapsule_IsValid(capsule.ptr(), "dltensor_versioned")) {
        void *content = PyCapsule_GetPointer(capsule.ptr(), "dltensor_versioned");
        const auto *managed = static_cast<const dlpack::managed_versioned *>(content);
        if (managed->version.major != 1)
            throw py::buffer_error("DLPack version " + std::to_string(managed->version.major) + " is not known; 1 is");
        tensor = &managed->tensor;
        writable = !(managed->flags & dlpack::kReadOnly);
    } else if (PyCapsule_IsValid(capsule.ptr(), "dltensor")) {
        tensor = &static_cast<const dlpack::managed *>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"))->tensor;
    } else {
        throw py::type_error("__dlpack__ returned no fresh DLPack capsule");
    }
    if (tensor->dtype.lanes != 1)
        throw py::buffer_error("elements are vectors of " + std::to_string(tensor->dtype.lanes));
    py::tuple shape(tensor->ndim), strides(tensor->ndim);
    int64_t dense = 1;
    for (int32_t d = tensor->ndim - 1; d >= 0; --d) {
        shape[d] = tensor->shape[d];
        strides[d] = tensor->strides ? tensor->strides[d] : dense;
        dense *= tensor->shape[d];
    }
    const uintptr_t address = reinterpret_cast<uintptr_t>(tensor->data) + tensor->byte_offset;
    return py::make_tuple(address, shape, strides, tensor->dtype.code, tensor->dtype.bits, tensor->device.type,
                          writable, capsule);
}

// The same of an object with the buffer protocol, and at the end what holds the buffer; None if it has no such protocol
// or its elements are no plain numbers in the processor's own layout.
py::object look_into_buffer(const py::object &owner) {
    const py::object memory = py::reinterpret_steal<py::object>(PyMemoryView_FromObject(owner.ptr()));
    if (!memory) {
        PyErr_Clear();
        return py::none();
    }
    const Py_buffer &view = *PyMemoryView_GET_BUFFER(memory.ptr());
    const char *format = view.format ? view.format : "B";
    format += *format == '@' || *format == '=' || *format == '<';
    const char *const kinds[] = {"bhilqn", "BHILQN", "efd"}; // DLPack's type codes 0, 1, 2
    int code = -1;
    for (int k = 0; k < 3; ++k)
        if (format[0] && !format[1] && strchr(kinds[k], format[0]))
            code = k;
    bool fits = code >= 0 && !view.suboffsets && reinterpret_cast<uintptr_t>(view.buf) % (size_t)view.itemsize == 0;
    py::tuple shape(view.ndim), strides(view.ndim);
    for (int d = 0; d < view.ndim; ++d) {
        fits = fits && view.strides[d] % view.itemsize == 0;
        shape[d] = view.shape[d];
        strides[d] = view.strides[d] / view.itemsize;
    }
    if (!fits)
        return py::none();
    return py::make_tuple(reinterpret_cast<uintptr_t>(view.buf), shape, strides, code, view.itemsize * 8, dlpack::kCPU,
                          !view.readonly, memory);
}

// decltype needs the declaration alone, so that nothing here links the CUDA library.
#define CUDA(name) cuda.def(#name, on_cuda("lt_cuda_" #name, static_cast<decltype(&lt_cuda_##name)>(nullptr)))

} // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "leantune's C++ kernels; see csrc/include/leantune_kernels.h";
    py::module_ cuda = m.def_submodule("cuda", "the CUDA library's functions, once open_library has opened it");
    cuda.def("open_library", open_cuda_library);

    m.def("look_into_buffer", look_into_buffer);
    m.def("look_into_dlpack", look_into_dlpack);
    m.def("isa", [] { return std::string(lt_isa()); });
    m.def("set_isa", set_isa);
    check_isa_of_environment();
    m.def("adopt_openmp", [] { return std::string(lt_adopt_openmp()); });
    m.def("set_num_threads", checked(lt_set_num_threads));
    m.def("num_threads", lt_num_threads);

    // RMSNorm
    m.def("rms_norm_forward", checked(lt_rms_norm_forward));
    m.def("rms_norm_backward", checked(lt_rms_norm_backward));
    m.def("add_rms_norm_forward", checked(lt_add_rms_norm_forward));
    CUDA(rms_norm_forward);
    CUDA(rms_norm_backward);
    CUDA(add_rms_norm_forward);

    // LayerNorm
    m.def("layer_norm_forward", checked(lt_layer_norm_forward));
    m.def("add_layer_norm_forward", checked(lt_add_layer_norm_forward));
    m.def("layer_norm_backward", checked(lt_layer_norm_backward));
    CUDA(layer_norm_forward);
    CUDA(add_layer_norm_forward);
    CUDA(layer_norm_backward);

    // Attention
    m.def("attention_forward", checked(lt_attention_forward));
    m.def("attention_backward", checked(lt_attention_backward));
    CUDA(attention_forward);
    CUDA(attention_backward);

    // Rotary embedding
    m.def("rope", checked(lt_rope));
    CUDA(rope);

    // Gated activations
    m.def("glu_forward", checked(lt_glu_forward));
    m.def("glu_backward", checked(lt_glu_backward));
    CUDA(glu_forward);
    CUDA(glu_backward);

    // Activations
    m.def("activation_forward", checked(lt_activation_forward));
    m.def("activation_backward", checked(lt_activation_backward));
    CUDA(activation_forward);
    CUDA(activation_backward);

    // Cross-entropy
    m.def("cross_entropy_rows", checked(lt_cross_entropy_rows));
    m.def("distillation_rows", checked(lt_distillation_rows));
    CUDA(cross_entropy_rows);
    CUDA(distillation_rows);

    // Optimizers
    m.def("adamw", checked(lt_adamw));
    m.def("adamw_8bit", checked(lt_adamw_8bit));
    m.def("sgd", checked(lt_sgd));
    m.def("rmsprop", checked(lt_rmsprop));
    m.def("sum_of_squares", checked(lt_sum_of_squares));
    m.def("scale", checked(lt_scale));
    CUDA(adamw);
    CUDA(adamw_8bit);
    CUDA(sgd);
    CUDA(rmsprop);
    CUDA(sum_of_squares);
    CUDA(scale);

    // Embedding
    m.def("embedding_forward", checked(lt_embedding_forward));
    m.def("embedding_backward", checked(lt_embedding_backward));
    CUDA(embedding_forward);
    CUDA(embedding_backward);

    // Dropout
    m.def("dropout", checked(lt_dropout));
    CUDA(dropout);

    // Low-rank products
    m.def("low_rank_merge", checked(lt_low_rank_merge));
    m.def("low_rank_gradients", checked(lt_low_rank_gradients));
    m.def("low_rank_add", checked(lt_low_rank_add));
    CUDA(low_rank_merge);
    CUDA(low_rank_project);
    CUDA(low_rank_linear);
    CUDA(low_rank_input_gradient);
    CUDA(low_rank_add);
    CUDA(low_rank_partials);
    CUDA(low_rank_reduce);

    // Bottleneck adapter
    m.def("bottleneck_forward", checked(lt_bottleneck_forward));
    m.def("bottleneck_backward", checked(lt_bottleneck_backward));
    CUDA(bottleneck_forward);
    CUDA(bottleneck_backward);

    // NF4 weights
    m.def("nf4_quantise", checked(lt_nf4_quantise));
    m.def("nf4_quantise_absmax", checked(lt_nf4_quantise_absmax));
    m.def("nf4_dequantise", checked(lt_nf4_dequantise));
    m.def("nf4_linear", checked(lt_nf4_linear));
    CUDA(nf4_quantise);
    CUDA(nf4_quantise_absmax);
    CUDA(nf4_dequantise);
    CUDA(nf4_linear);

    // int8 weights and activations
    m.def("int8_quantise", checked(lt_int8_quantise));
    m.def("int8_dequantise", checked(lt_int8_dequantise));
    m.def("int8_linear", checked(lt_int8_linear));
    CUDA(int8_quantise);
    CUDA(int8_dequantise);
    CUDA(int8_linear);

    // Activations kept in bf16
    m.def("pack_bf16", checked(lt_pack_bf16));
    m.def("unpack_bf16", checked(lt_unpack_bf16));
    CUDA(pack_bf16);
    CUDA(unpack_bf16);
}
