// checks.h: what is checked of an argument before a kernel sees it, in one place for every launcher of every backend. Whoever
// calls a registered op, with whatever tensors: it stays inside of their memory, or it is an error. rerank_kernels/ops/*.py
// checks shapes and dtypes before, where the message can say more.
//
// A tensor is asked once. What a launcher uses afterwards is the View, so nothing is checked in one state and read in another.
// Results are new tensors, so no argument overlaps one.
#pragma once

#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "args.h"

// Whoever reads the message called an op: it says nothing of our files.
#define RK_CHECK(condition, op, ...)           \
    do {                                       \
        if (!(condition)) [[unlikely]]         \
            rk::refuse(op, ": ", __VA_ARGS__); \
    } while (false)

namespace rk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Words>
[[noreturn, gnu::cold, gnu::noinline]] void refuse(const Words&... words) {
    std::ostringstream all;
    (all << ... << words);
    throw std::runtime_error(all.str());
}

constexpr int64_t ANY = -1;

// A size that an op wants, and the letter that messages call it by.
struct Size {
    const char* letter;
    int64_t n = ANY;
};
using Shape = std::initializer_list<Size>;

// Which strides a kernel can read: all elements side by side, those of the last dimension, or any.
enum class Lies { CONTIGUOUS, FEATURES_TOGETHER, ANYHOW };

// What a tensor was when it was checked.
struct View {
    const void* data = nullptr;
    Dtype dtype = Dtype::F32;  // of one that may have other types: not looked at
    bool given = false;
    int64_t numel = 0;
    int64_t size[3] = {}, stride[3] = {};  // where a shape was asked for

    Ref ref() const { return {data, dtype, given}; }
    template <class T>
    const T* as() const {
        return static_cast<const T*>(data);
    }
};

// As Python calls them, for messages.
inline const char* name_of(ScalarType t) {
    switch (t) {
        case ScalarType::Float: return "float32";
        case ScalarType::Half: return "float16";
        case ScalarType::BFloat16: return "bfloat16";
        case ScalarType::Double: return "float64";
        case ScalarType::Char: return "int8";
        case ScalarType::Int: return "int32";
        case ScalarType::Long: return "int64";
        case ScalarType::Bool: return "bool";
        default: return torch::headeronly::toString(t);
    }
}

inline Dtype dtype_of(ScalarType t, const char* op, const char* name) {
    if (t == ScalarType::Float) return Dtype::F32;
    if (t == ScalarType::Half) return Dtype::F16;
    if (t == ScalarType::BFloat16) return Dtype::BF16;
    refuse(op, ": ", name, " must be float32, float16 or bfloat16, got ", name_of(t));
}

// The arguments of one call. `like` is the one whose device all the others share.
class Arguments {
   public:
    Arguments(const char* op, const Tensor& like) : op_(op) { place(like, device_type_, device_index_); }

    // A tensor of float32, float16 or bfloat16.
    View floats(const char* name, const Tensor& t, Shape shape, Lies lies = Lies::CONTIGUOUS) const {
        const ScalarType type = t.scalar_type();
        const Dtype dtype = dtype_of(type, op_, name);
        View v = taken(name, t, type, bytes_of(dtype), shape, lies);
        v.dtype = dtype;
        return v;
    }
    View floats(const char* name, const std::optional<Tensor>& t, Shape shape) const {
        return t ? floats(name, *t, shape) : View{};
    }
    // One of exactly this type, contiguous.
    View typed(const char* name, const Tensor& t, ScalarType type, int64_t bytes, Shape shape) const {
        const ScalarType came = t.scalar_type();
        RK_CHECK(came == type, op_, name, " must be ", name_of(type), ", got ", name_of(came));
        return taken(name, t, type, bytes, shape, Lies::CONTIGUOUS);
    }
    // cu_seqlens [B + 1]: numel - 1 is B. Its values are not looked at.
    View offsets(const char* name, const Tensor& t) const {
        const View v = typed(name, t, ScalarType::Int, 4, {{"B + 1"}});
        RK_CHECK(v.numel > 0, op_, name, " must be [B + 1], got no offsets");
        return v;
    }
    // [2, B]: where each of B sequences begins and ends. Its values are not looked at.
    View spans(const char* name, const Tensor& t, int64_t B) const {
        return typed(name, t, ScalarType::Int, 4, {{"begins and ends", 2}, {"B", B}});
    }
    void activation(int64_t kind) const {
        RK_CHECK(0 <= kind && kind < ACTIVATIONS, op_, "the activation must be from 0 to ", ACTIVATIONS - 1, ", got ", kind);
    }

    const char* op() const { return op_; }

   private:
    static void place(const Tensor& t, int32_t& type, int32_t& index) {
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &type));
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t.get(), &index));
    }

    View taken(const char* name, const Tensor& t, ScalarType type, int64_t bytes, Shape shape, Lies lies) const {
        int32_t layout = 0, device_type = 0, device_index = 0;
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(t.get(), &layout));
        RK_CHECK(layout == aoti_torch_layout_strided(), op_, name, " must be a dense tensor; use .to_dense()");
        place(t, device_type, device_index);
        RK_CHECK(device_type == device_type_ && device_index == device_index_, op_, name,
                 " must be on the device of the first argument; move it with .to(device)");
        int64_t *sizes = nullptr, *strides = nullptr, offset = 0, stored = 0;
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(t.get(), &sizes));
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(t.get(), &strides));
        const int64_t dim = t.dim();
        View v;
        v.given = true;
        bool fits = shape.size() == 0 || dim == int64_t(shape.size());
        for (int64_t i = 0; fits && shape.size() != 0 && i < dim; ++i) {
            const int64_t want = shape.begin()[i].n;
            v.size[i] = sizes[i];
            v.stride[i] = strides[i];
            fits = want == ANY || want == sizes[i];
        }
        if (!fits) refuse_shape(name, sizes, dim, shape);

        // from the last dimension: how many elements there are, whether side by side, and how far the last one is
        bool side_by_side = true, over = false;
        int64_t last = 0;
        v.numel = 1;
        for (int64_t i = dim - 1; i >= 0; --i) {
            const bool together = sizes[i] <= 1 || strides[i] == v.numel;
            side_by_side = side_by_side && (together || (lies == Lies::FEATURES_TOGETHER && i < dim - 1));
            int64_t far = 0;
            over = over || __builtin_mul_overflow(v.numel, sizes[i], &v.numel);
            over = over || __builtin_mul_overflow(sizes[i] - 1, strides[i], &far) || __builtin_add_overflow(last, far, &last);
        }
        if (v.numel == 0 && !over) return v;  // nothing is read, wherever it lies
        if (!side_by_side && lies != Lies::ANYHOW) refuse_strides(name, sizes, strides, dim, lies);
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(t.get(), &offset));
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &stored));
        int64_t end = 0;  // of its memory, in bytes
        over = over || __builtin_add_overflow(last + 1, offset, &end) || __builtin_mul_overflow(end, bytes, &end);
        RK_CHECK(!over && end <= stored, op_, name, " must have memory for its ", v.numel, " elements, and its storage holds ",
                 stored, " bytes: it was freed or made smaller; give a tensor that still has its values");
        v.data = t.const_data_ptr();
        RK_CHECK(v.data != nullptr, op_, name, " has no memory of its own; give the tensor that it stands for");
        RK_CHECK(reinterpret_cast<uintptr_t>(v.data) % uintptr_t(bytes) == 0, op_, name, " must begin at a multiple of ", bytes,
                 " bytes, as ", name_of(type), " does elsewhere; .clone() gives it such a place");
        return v;
    }

    static std::string list(const int64_t* values, int64_t count) {
        std::string all = "[";
        for (int64_t i = 0; i < count; ++i) all += (i ? ", " : "") + std::to_string(values[i]);
        return all + "]";
    }
    [[noreturn, gnu::cold, gnu::noinline]] void refuse_shape(const char* name, const int64_t* sizes, int64_t dim,
                                                             Shape shape) const {
        std::string want;
        for (const Size& s : shape)
            want += (want.empty() ? "" : ", ") + std::string(s.letter) + (s.n == ANY ? "" : " = " + std::to_string(s.n));
        refuse(op_, ": ", name, " must be [", want, "], got ", list(sizes, dim));
    }
    [[noreturn, gnu::cold, gnu::noinline]] void refuse_strides(const char* name, const int64_t* sizes, const int64_t* strides,
                                                               int64_t dim, Lies lies) const {
        refuse(op_, ": ", name, lies == Lies::CONTIGUOUS ? " must be contiguous" : " must have its features side by side",
               ", got ", list(sizes, dim), " with strides ", list(strides, dim),
               "; .clone(memory_format=torch.contiguous_format) lays it out");
    }

    const char* op_;
    int32_t device_type_ = 0, device_index_ = 0;
};

}  // namespace rk
