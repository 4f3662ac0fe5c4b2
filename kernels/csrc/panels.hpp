// y = x W' + b for a few rows of x and a weight W in panels: decode steps, which read every weight for a token each.
#pragma once

#include <cstdint>

namespace macpo {

// Whether this CPU runs the functions below (AVX-512).
bool has_panels();

// Outputs of a panel: W [outputs, width] lies as [ceil(outputs / kPanelOutputs)][width][kPanelOutputs], the last panel
// filled up with zeros.
constexpr int64_t kPanelOutputs = 32;
int64_t panel_floats(int64_t outputs, int64_t width);
void pack_panels(const float* weight, int64_t stride, int64_t outputs, int64_t width, float* panels, int threads);

// y [rows, outputs], contiguous; rows of x are `stride` apart; bias [outputs] or null. The sum of an element runs in an
// order that depends on the width alone.
void panel_product(const float* x, int64_t stride, int64_t rows, const float* panels, const float* bias,
                   int64_t outputs, int64_t width, float* y, int threads);

}  // namespace macpo
