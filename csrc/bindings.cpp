// Python's view of the C interface: pointers travel as integers, a status other than LT_OK becomes RuntimeError.
// One line per function; shapes and strides are checked by the Python side, which knows the tensors' names.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <dlfcn.h>

#include <stdexcept>
#include <string>

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

// decltype needs the declaration alone, so that nothing here links the CUDA library.
#define CUDA(name) cuda.def(#name, on_cuda("lt_cuda_" #name, static_cast<decltype(&lt_cuda_##name)>(nullptr)))

} // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "leantune's C++ kernels; see csrc/include/leantune_kernels.h";
    py::module_ cuda = m.def_submodule("cuda", "the CUDA library's functions, once open_library has opened it");
    cuda.def("open_library", open_cuda_library);

    m.def("isa", [] { return std::string(lt_isa()); });
    m.def("set_isa", [](const std::string &name) {
        if (lt_set_isa(name.c_str()) != LT_OK)
            throw std::invalid_argument(lt_last_error());
    });
    m.def("adopt_openmp", [] { return std::string(lt_adopt_openmp()); });
    m.def("set_num_threads", checked(lt_set_num_threads));
    m.def("num_threads", lt_num_threads);

    // RMSNorm
    m.def("rms_norm_forward", checked(lt_rms_norm_forward));
    m.def("rms_norm_backward", checked(lt_rms_norm_backward));
    CUDA(rms_norm_forward);
    CUDA(rms_norm_backward);

    // Attention
    m.def("attention_forward", checked(lt_attention_forward));
    m.def("attention_backward", checked(lt_attention_backward));

    // Rotary embedding
    m.def("rope", checked(lt_rope));

    // Gated activations
    m.def("swiglu_forward", checked(lt_swiglu_forward));
    m.def("swiglu_backward", checked(lt_swiglu_backward));

    // Cross-entropy
    m.def("cross_entropy_rows", checked(lt_cross_entropy_rows));

    // Optimizers
    m.def("adamw", checked(lt_adamw));
    m.def("sum_of_squares", checked(lt_sum_of_squares));

    // Dropout
    m.def("dropout", checked(lt_dropout));

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
}
