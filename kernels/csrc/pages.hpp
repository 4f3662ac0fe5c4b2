#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace macpo {

// Ask for pages of 2 MiB under fresh memory, of which each step's first touch then takes hundreds instead of ten
// thousands of faults. A hint: other systems, and kernels that refuse, go on with small pages.
inline void ask_huge_pages([[maybe_unused]] void* begin, [[maybe_unused]] size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t page = uintptr_t{1} << 12;
    const auto first = (reinterpret_cast<uintptr_t>(begin) + page - 1) & ~(page - 1);
    const auto last = (reinterpret_cast<uintptr_t>(begin) + bytes) & ~(page - 1);
    if (last > first) (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace macpo
