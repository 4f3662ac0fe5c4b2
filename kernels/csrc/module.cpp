// macpo.kernels._native: numpy-free views of CPU tensors (DLPack) in, results into tensors that the caller made.
// Only kernels/native.py imports it; shapes have been checked by the operators, and are checked once more here.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <exception>
#include <optional>
#include <stdexcept>
#include <vector>

#include "attention.hpp"
#include "gemm.hpp"
#include "head.hpp"
#include "panels.hpp"
#include "rows.hpp"
#include "sampling.hpp"

namespace nb = nanobind;
using nb::arg;

template <typename T, size_t Dims>
using View = nb::ndarray<T, nb::ndim<Dims>, nb::c_contig, nb::device::cpu>;
template <typename T>
using Strided = nb::ndarray<T, nb::ndim<2>, nb::device::cpu>;
using Heads = nb::ndarray<const float, nb::ndim<3>, nb::device::cpu>;
using Floats = std::optional<View<const float, 1>>;

namespace {

void need(bool holds, const char* what) {
    if (!holds) throw std::invalid_argument(what);
}

void check_targets(const View<const int64_t, 1>& target, size_t n, size_t v) {
    need(target.shape(0) == n, "target must have one id a row");
    for (size_t i = 0; i < n; ++i)
        need(target(i) >= 0 && target(i) < static_cast<int64_t>(v), "target outside the vocabulary");
}

macpo::Products products(const Strided<const float>& z, bool lanes) {
    need(z.size() == 0 || z.shape(1) < 2 || z.stride(1) == 1, "one axis of z must be contiguous");
    const int64_t rows = z.shape(lanes ? 1 : 0), vocab = z.shape(lanes ? 0 : 1);
    return {z.data(), rows, vocab, z.stride(0), lanes};
}

macpo::Head make_head(const macpo::Products& z, const Floats& bias, float scale, float softcap) {
    need(!bias || static_cast<int64_t>(bias->shape(0)) == z.vocab, "bias must have one entry a token");
    return {bias ? bias->data() : nullptr, scale, softcap};
}

// d has the layout of z: float32, or 16-bit integers that hold bfloat16 or half bits.
macpo::Gradient gradient(const macpo::Products& z, const nb::ndarray<nb::ndim<2>, nb::device::cpu>& d, bool half) {
    const bool fits = static_cast<int64_t>(d.shape(z.lanes ? 1 : 0)) == z.rows &&
                      static_cast<int64_t>(d.shape(z.lanes ? 0 : 1)) == z.vocab;
    need(fits && (d.size() == 0 || d.shape(1) < 2 || d.stride(1) == 1), "d must have the shape of z and contiguous rows");
    const bool floats = d.dtype() == nb::dtype<float>();
    need(floats || d.dtype() == nb::dtype<int16_t>(), "d must be float32, or 16 bits as int16");
    using macpo::Format;
    return {d.data(), d.stride(0), floats ? Format::float32 : half ? Format::half : Format::bfloat16};
}

void row_logp(Strided<const float> z, bool lanes, Floats bias, float scale, float softcap,
              View<const int64_t, 1> target, View<float, 1> logp, View<float, 1> lse, int threads) {
    const macpo::Products from = products(z, lanes);
    const macpo::Head head = make_head(from, bias, scale, softcap);
    check_targets(target, from.rows, from.vocab);
    need(logp.shape(0) == target.shape(0) && lse.shape(0) == target.shape(0), "logp and lse must be [N]");
    nb::gil_scoped_release unlocked;
    macpo::row_logp(from, head, target.data(), logp.data(), lse.data(), threads);
}

void row_partials(Strided<const float> z, bool lanes, Floats bias, float scale, float softcap,
                  View<const int64_t, 1> target, View<float, 1> top, View<float, 1> rest, View<float, 1> hit,
                  int threads) {
    const macpo::Products from = products(z, lanes);
    const macpo::Head head = make_head(from, bias, scale, softcap);
    check_targets(target, from.rows, from.vocab);
    const size_t n = target.shape(0);
    need(top.shape(0) == n && rest.shape(0) == n && hit.shape(0) == n, "top, rest and hit must be [N]");
    nb::gil_scoped_release unlocked;
    macpo::row_partials(from, head, target.data(), top.data(), rest.data(), hit.data(), threads);
}

void row_dlogits(Strided<const float> z, bool lanes, Floats bias, float scale, float softcap,
                 View<const int64_t, 1> target, View<const float, 1> lse, nb::ndarray<nb::ndim<2>, nb::device::cpu> d,
                 bool half, int threads) {
    const macpo::Products from = products(z, lanes);
    const macpo::Head head = make_head(from, bias, scale, softcap);
    const macpo::Gradient to = gradient(from, d, half);
    check_targets(target, from.rows, from.vocab);
    need(lse.shape(0) == target.shape(0), "lse must be [N]");
    nb::gil_scoped_release unlocked;
    macpo::row_dlogits(from, head, target.data(), lse.data(), to, threads);
}

void row_logp_dlogits(Strided<const float> z, bool lanes, Floats bias, float scale, float softcap,
                      View<const int64_t, 1> target, View<float, 1> logp, View<float, 1> lse,
                      nb::ndarray<nb::ndim<2>, nb::device::cpu> d, bool half, int threads) {
    const macpo::Products from = products(z, lanes);
    const macpo::Head head = make_head(from, bias, scale, softcap);
    const macpo::Gradient to = gradient(from, d, half);
    check_targets(target, from.rows, from.vocab);
    need(logp.shape(0) == target.shape(0) && lse.shape(0) == target.shape(0), "logp and lse must be [N]");
    nb::gil_scoped_release unlocked;
    macpo::row_logp_dlogits(from, head, target.data(), logp.data(), lse.data(), to, threads);
}

// c [m, n] = or += a [m, k] b [k, n]; a and b are bfloat16 bits as int16, b with any strides.
void bf16_gemm(Strided<const int16_t> a, Strided<const int16_t> b, Strided<float> c, bool accumulate, int threads) {
    const int64_t m = a.shape(0), k = a.shape(1), n = b.shape(1);
    need(macpo::has_bf16_gemm(), "bf16_gemm needs a CPU with AVX512-BF16");
    need(static_cast<int64_t>(b.shape(0)) == k && static_cast<int64_t>(c.shape(0)) == m &&
             static_cast<int64_t>(c.shape(1)) == n,
         "a [m, k], b [k, n] and c [m, n] do not fit");
    need((a.size() == 0 || k < 2 || a.stride(1) == 1) && (c.size() == 0 || n < 2 || c.stride(1) == 1), "rows of a and c must be contiguous");
    nb::gil_scoped_release unlocked;
    std::vector<uint32_t> packed(static_cast<size_t>(macpo::packed_pairs(k, n)));
    macpo::pack_pairs(reinterpret_cast<const uint16_t*>(b.data()), k, n, b.stride(0), b.stride(1), packed.data(),
                      threads);
    macpo::bf16_gemm(reinterpret_cast<const uint16_t*>(a.data()), a.stride(0), packed.data(), c.data(), c.stride(0), m,
                     n, k, accumulate, threads);
}

// hidden [n, h], weight [v, h] and d [v, n] are bfloat16 bits as int16; contiguous last axes.
void head_logp(Strided<const int16_t> hidden, Strided<const int16_t> weight, Floats bias, float scale,
               View<const int64_t, 1> target, View<float, 1> logp, View<float, 1> lse, View<float, 1> factor,
               std::optional<Strided<int16_t>> d, int threads) {
    const size_t n = hidden.shape(0), v = weight.shape(0), h = hidden.shape(1);
    need(macpo::has_bf16_gemm(), "head_logp needs a CPU with AVX512-BF16");
    need(weight.shape(1) == h && h > 0, "hidden [n, h] and weight [v, h] do not fit");
    need((n == 0 || h < 2 || hidden.stride(1) == 1) && (v == 0 || h < 2 || weight.stride(1) == 1),
         "rows of hidden and weight must be contiguous");
    need(!bias || bias->shape(0) == v, "bias must have one entry a token");
    check_targets(target, n, v);
    need(logp.shape(0) == n && lse.shape(0) == n && factor.shape(0) == n, "logp, lse and factor must be [N]");
    need(!d || (d->shape(0) == v && d->shape(1) == n && (d->size() == 0 || n < 2 || d->stride(1) == 1)),
         "d must be [V, N] with contiguous rows");
    const auto bits = [](const auto& x) { return reinterpret_cast<const uint16_t*>(x.data()); };
    const macpo::Bf16Head head{bits(hidden), static_cast<int64_t>(n), hidden.stride(0), bits(weight),
                               static_cast<int64_t>(v), weight.stride(0), static_cast<int64_t>(h),
                               bias ? bias->data() : nullptr, scale, target.data()};
    const macpo::HeadResults to{logp.data(), lse.data(), factor.data(),
                                d ? reinterpret_cast<uint16_t*>(d->data()) : nullptr, d ? d->stride(0) : 0};
    nb::gil_scoped_release unlocked;
    macpo::head_logp(head, to, threads);
}

// weight [outputs, width] -> panels [panels * width * 32]
void pack_panels(Strided<const float> weight, View<float, 1> panels, int threads) {
    const int64_t outputs = weight.shape(0), width = weight.shape(1);
    need(weight.size() == 0 || width < 2 || weight.stride(1) == 1, "rows of weight must be contiguous");
    need(static_cast<int64_t>(panels.shape(0)) == macpo::panel_floats(outputs, width), "panels have another size");
    nb::gil_scoped_release unlocked;
    macpo::pack_panels(weight.data(), weight.stride(0), outputs, width, panels.data(), threads);
}

void panel_product(Strided<const float> x, View<const float, 1> panels, Floats bias, View<float, 2> y, int threads) {
    const int64_t rows = x.shape(0), width = x.shape(1), outputs = y.shape(1);
    need(macpo::has_panels(), "panel_product needs a CPU with AVX-512");
    need(x.size() == 0 || width < 2 || x.stride(1) == 1, "rows of x must be contiguous");
    need(static_cast<int64_t>(y.shape(0)) == rows, "y must have the rows of x");
    need(static_cast<int64_t>(panels.shape(0)) == macpo::panel_floats(outputs, width), "panels are of another weight");
    need(!bias || static_cast<int64_t>(bias->shape(0)) == outputs, "bias must have one entry an output");
    nb::gil_scoped_release unlocked;
    macpo::panel_product(x.data(), x.stride(0), rows, panels.data(), bias ? bias->data() : nullptr, outputs, width,
                         y.data(), threads);
}

void slot_attention(Heads q,
                    nb::ndarray<float, nb::ndim<4>, nb::device::cpu> k,
                    nb::ndarray<float, nb::ndim<4>, nb::device::cpu> v, View<const int64_t, 1> lens, float scale,
                    int64_t window, float softcap, Floats sinks, std::optional<Heads> new_k, std::optional<Heads> new_v,
                    View<float, 3> out, int threads) {
    const int64_t rows = q.shape(0), heads = q.shape(1), kv_heads = k.shape(1), size = q.shape(2);
    need(macpo::kMinHead <= size && size <= macpo::kMaxHead, "head size out of range");
    need(kv_heads > 0 && heads % kv_heads == 0, "heads must be a multiple of the key-value heads");
    for (size_t axis = 0; axis < 4; ++axis) need(k.shape(axis) == v.shape(axis), "k and v must have one shape");
    need(static_cast<int64_t>(k.shape(3)) == size && static_cast<int64_t>(k.shape(0)) >= rows,
         "the caches must have a slot a row and the head size of q");
    need(q.stride(2) == 1 && k.stride(3) == 1 && v.stride(3) == 1, "head vectors must be contiguous");
    for (size_t axis = 0; axis < 3; ++axis) need(out.shape(axis) == q.shape(axis), "out must have the shape of q");
    need(static_cast<int64_t>(lens.shape(0)) == rows && window >= 0, "lens must have one length a row");
    for (int64_t i = 0; i < rows; ++i)
        need(lens.data()[i] >= 1 && lens.data()[i] <= static_cast<int64_t>(k.shape(2)), "a length outside the slot");
    need(softcap >= 0.0f, "softcap must not be negative");
    need(!sinks || static_cast<int64_t>(sinks->shape(0)) == heads, "sinks must have one entry a head");
    need(new_k.has_value() == new_v.has_value(), "a new token has a key and a value");
    macpo::SlotAttention call{q.data(),    k.data(),    v.data(),    q.stride(0), q.stride(1), k.stride(0),
                              k.stride(1), k.stride(2), v.stride(0), v.stride(1), v.stride(2), lens.data(),
                              out.data(),  rows,        heads,       kv_heads,    size,        scale,
                              window,      softcap,     sinks ? sinks->data() : nullptr,
                              nullptr,     nullptr,     0,           0,           0,
                              0};
    if (new_k) {
        for (const Heads& x : {*new_k, *new_v})
            need(static_cast<int64_t>(x.shape(0)) == rows && static_cast<int64_t>(x.shape(1)) == kv_heads &&
                     static_cast<int64_t>(x.shape(2)) == size && x.stride(2) == 1,
                 "new keys and values must be [rows, kv_heads, size]");
        call.new_k = new_k->data();
        call.new_v = new_v->data();
        call.new_k_row = new_k->stride(0), call.new_k_head = new_k->stride(1);
        call.new_v_row = new_v->stride(0), call.new_v_head = new_v->stride(1);
    }
    nb::gil_scoped_release unlocked;
    macpo::slot_attention(call, threads);
}

void sample(View<const float, 2> logits, View<const int64_t, 1> seed, View<const float, 1> temperature,
            View<const float, 1> top_p, View<const int64_t, 1> top_k, View<const float, 1> min_p,
            View<const float, 1> penalty, std::optional<View<const bool, 2>> seen, View<const int64_t, 2> request_keys,
            View<const int64_t, 1> positions, View<int64_t, 1> ids, View<float, 1> raw, View<float, 1> processed,
            int threads) {
    const size_t n = logits.shape(0), v = logits.shape(1);
    for (size_t size : {seed.shape(0), temperature.shape(0), top_p.shape(0), top_k.shape(0), min_p.shape(0),
                        penalty.shape(0), request_keys.shape(0), positions.shape(0), ids.shape(0), raw.shape(0),
                        processed.shape(0)})
        need(size == n, "every argument must have one entry a row");
    need(request_keys.shape(1) == 3, "request_keys must be [B, 3]");
    need(!seen || (seen->shape(0) == n && seen->shape(1) == v), "seen must be [B, V]");
    const bool* seen_data = seen ? seen->data() : nullptr;
    nb::gil_scoped_release unlocked;
    std::exception_ptr failure;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (size_t i = 0; i < n; ++i) {
        try {  // an exception (out of memory) must not leave the parallel region
            const macpo::RowParams params{seed.data()[i],  temperature.data()[i], top_p.data()[i],
                                          min_p.data()[i], penalty.data()[i],     top_k.data()[i]};
            const macpo::Draw draw =
                macpo::sample_row(logits.data() + i * v, seen_data ? seen_data + i * v : nullptr, v, params,
                                  request_keys.data() + 3 * i, positions.data()[i]);
            ids.data()[i] = draw.id;
            raw.data()[i] = draw.raw_logp;
            processed.data()[i] = draw.logp;
        } catch (...) {
#pragma omp critical
            failure = std::current_exception();
        }
    }
    if (failure) std::rethrow_exception(failure);
}

void token_words(View<const int64_t, 1> seed, View<const int64_t, 2> request_keys, View<const int64_t, 1> positions,
                 View<const int64_t, 2> tokens, View<int64_t, 2> words) {
    const size_t n = tokens.shape(0), k = tokens.shape(1);
    need(seed.shape(0) == n && positions.shape(0) == n && request_keys.shape(0) == n && request_keys.shape(1) == 3,
         "every argument must have one entry a row");
    need(words.shape(0) == n && words.shape(1) == k, "words must have the shape of tokens");
    for (size_t i = 0; i < n; ++i)
        macpo::token_words(seed.data()[i], request_keys.data() + 3 * i, positions.data()[i], tokens.data() + i * k, k,
                           words.data() + i * k);
}

}  // namespace

NB_MODULE(_native, m) {
    m.doc() = "C++ CPU kernels of macpo; macpo.kernels.native is the one place that loads them.";
    m.def("row_logp", &row_logp, arg("z").noconvert(), arg("lanes"), arg("bias").noconvert().none(), arg("scale"),
          arg("softcap"), arg("target").noconvert(), arg("logp").noconvert(), arg("lse").noconvert(), arg("threads"));
    m.def("row_partials", &row_partials, arg("z").noconvert(), arg("lanes"), arg("bias").noconvert().none(),
          arg("scale"), arg("softcap"), arg("target").noconvert(), arg("top").noconvert(), arg("rest").noconvert(),
          arg("hit").noconvert(), arg("threads"));
    m.def("row_dlogits", &row_dlogits, arg("z").noconvert(), arg("lanes"), arg("bias").noconvert().none(),
          arg("scale"), arg("softcap"), arg("target").noconvert(), arg("lse").noconvert(), arg("d").noconvert(),
          arg("half"), arg("threads"));
    m.def("row_logp_dlogits", &row_logp_dlogits, arg("z").noconvert(), arg("lanes"), arg("bias").noconvert().none(),
          arg("scale"), arg("softcap"), arg("target").noconvert(), arg("logp").noconvert(), arg("lse").noconvert(),
          arg("d").noconvert(), arg("half"), arg("threads"));
    m.def("has_bf16_gemm", &macpo::has_bf16_gemm);
    m.def("bf16_gemm", &bf16_gemm, arg("a").noconvert(), arg("b").noconvert(), arg("c").noconvert(),
          arg("accumulate"), arg("threads"));
    m.def("head_logp", &head_logp, arg("hidden").noconvert(), arg("weight").noconvert(), arg("bias").noconvert().none(),
          arg("scale"), arg("target").noconvert(), arg("logp").noconvert(), arg("lse").noconvert(),
          arg("factor").noconvert(), arg("d").noconvert().none(), arg("threads"));
    m.def("has_panels", &macpo::has_panels);
    m.def("pack_panels", &pack_panels, arg("weight").noconvert(), arg("panels").noconvert(), arg("threads"));
    m.def("panel_product", &panel_product, arg("x").noconvert(), arg("panels").noconvert(),
          arg("bias").noconvert().none(), arg("y").noconvert(), arg("threads"));
    m.def("has_slot_attention", &macpo::has_slot_attention);
    m.def("slot_attention", &slot_attention, arg("q").noconvert(), arg("k").noconvert(), arg("v").noconvert(),
          arg("lens").noconvert(), arg("scale"), arg("window"), arg("softcap"), arg("sinks").noconvert().none(),
          arg("new_k").noconvert().none(), arg("new_v").noconvert().none(), arg("out").noconvert(), arg("threads"));
    m.def("sample", &sample, arg("logits").noconvert(), arg("seed").noconvert(), arg("temperature").noconvert(),
          arg("top_p").noconvert(), arg("top_k").noconvert(), arg("min_p").noconvert(), arg("penalty").noconvert(),
          arg("seen").noconvert().none(), arg("request_keys").noconvert(), arg("positions").noconvert(),
          arg("ids").noconvert(), arg("raw").noconvert(), arg("processed").noconvert(), arg("threads"));
    m.def("token_words", &token_words, arg("seed").noconvert(), arg("request_keys").noconvert(),
          arg("positions").noconvert(), arg("tokens").noconvert(), arg("words").noconvert());
}
