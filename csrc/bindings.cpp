// Python's view of the C interface: pointers travel as integers, a status other than LT_OK becomes RuntimeError.
// One line per function; shapes and strides are checked by the Python side, which knows the tensors' names.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>

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

} // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "leantune's C++ kernels; see csrc/include/leantune_kernels.h";
    m.def("isa", [] { return std::string(lt_isa()); });
    m.def("set_isa", [](const std::string &name) {
        if (lt_set_isa(name.c_str()) != LT_OK)
            throw std::invalid_argument(lt_last_error());
    });
    m.def("adopt_openmp", [] { return std::string(lt_adopt_openmp()); });
    m.def("set_num_threads", checked(lt_set_num_threads));
    m.def("num_threads", lt_num_threads);

    m.def("rms_norm_forward", checked(lt_rms_norm_forward));
    m.def("rms_norm_backward", checked(lt_rms_norm_backward));

    m.def("attention_forward", checked(lt_attention_forward));
    m.def("attention_backward", checked(lt_attention_backward));

    m.def("rope", checked(lt_rope));
    m.def("swiglu_forward", checked(lt_swiglu_forward));
    m.def("swiglu_backward", checked(lt_swiglu_backward));
    m.def("cross_entropy_rows", checked(lt_cross_entropy_rows));
    m.def("adamw", checked(lt_adamw));
    m.def("sum_of_squares", checked(lt_sum_of_squares));
    m.def("dropout", checked(lt_dropout));

    m.def("low_rank_merge", checked(lt_low_rank_merge));
    m.def("low_rank_gradients", checked(lt_low_rank_gradients));
    m.def("low_rank_add", checked(lt_low_rank_add));
}
