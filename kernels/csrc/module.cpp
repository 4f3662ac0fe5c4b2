// macpo.kernels._native: numpy-free views of CPU tensors (DLPack) in, results into tensors that the caller made.
// Only kernels/native.py imports it; shapes have been checked by the operators, and are checked once more here.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <exception>
#include <optional>
#include <stdexcept>

#include "rows.hpp"
#include "sampling.hpp"

namespace nb = nanobind;
using nb::arg;

template <typename T, size_t Dims>
using View = nb::ndarray<T, nb::ndim<Dims>, nb::c_contig, nb::device::cpu>;

namespace {

void need(bool holds, const char* what) {
    if (!holds) throw std::invalid_argument(what);
}

void check_targets(const View<const int64_t, 1>& target, size_t n, size_t v) {
    need(target.shape(0) == n, "target must have one id a row");
    for (size_t i = 0; i < n; ++i)
        need(target(i) >= 0 && target(i) < static_cast<int64_t>(v), "target outside the vocabulary");
}

void row_logp(View<const float, 2> logits, View<const int64_t, 1> target, View<float, 1> logp, View<float, 1> lse,
              int threads) {
    const size_t n = logits.shape(0), v = logits.shape(1);
    check_targets(target, n, v);
    need(logp.shape(0) == n && lse.shape(0) == n, "logp and lse must be [N]");
    nb::gil_scoped_release unlocked;
    macpo::row_logp(logits.data(), target.data(), n, v, logp.data(), lse.data(), threads);
}

void row_dlogits(View<float, 2> logits, View<const int64_t, 1> target, View<const float, 1> lse, float scale,
                 float softcap, int threads) {
    const size_t n = logits.shape(0), v = logits.shape(1);
    check_targets(target, n, v);
    need(lse.shape(0) == n, "lse must be [N]");
    nb::gil_scoped_release unlocked;
    macpo::row_dlogits(logits.data(), target.data(), lse.data(), n, v, scale, softcap, threads);
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
    m.def("row_logp", &row_logp, arg("logits").noconvert(), arg("target").noconvert(), arg("logp").noconvert(),
          arg("lse").noconvert(), arg("threads"));
    m.def("row_dlogits", &row_dlogits, arg("logits").noconvert(), arg("target").noconvert(), arg("lse").noconvert(),
          arg("scale"), arg("softcap"), arg("threads"));
    m.def("sample", &sample, arg("logits").noconvert(), arg("seed").noconvert(), arg("temperature").noconvert(),
          arg("top_p").noconvert(), arg("top_k").noconvert(), arg("min_p").noconvert(), arg("penalty").noconvert(),
          arg("seen").noconvert().none(), arg("request_keys").noconvert(), arg("positions").noconvert(),
          arg("ids").noconvert(), arg("raw").noconvert(), arg("processed").noconvert(), arg("threads"));
    m.def("token_words", &token_words, arg("seed").noconvert(), arg("request_keys").noconvert(),
          arg("positions").noconvert(), arg("tokens").noconvert(), arg("words").noconvert());
}
