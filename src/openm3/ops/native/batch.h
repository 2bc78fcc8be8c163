// A packed batch as the operators get it, checked once so that no kernel can read outside its tensors.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace openm3 {

// Request r owns tokens start[r]..start[r+1], the last of its length[r] keys; page[r * width + b] holds block b.
struct Batch {
    int requests;
    int width;
    const std::int32_t* page;
    std::vector<std::int64_t> start, length;

    const std::int32_t* pages(int r) const { return page + std::int64_t(r) * width; }
    std::int64_t count(int r) const { return start[r + 1] - start[r]; }
    // Position of token t (of all packed ones) in its request r.
    std::int64_t position(int r, std::int64_t t) const { return length[r] - start[r + 1] + t; }

    // Throws std::invalid_argument unless starts, lengths and every page that a token can see are inside the tensors.
    void check(std::int64_t num_tokens, std::int64_t num_pages, int block_size) const {
        if (start.empty() || start.front() != 0 || start.back() != num_tokens)
            throw std::invalid_argument("start_R1 must go from 0 to the number of tokens");
        for (int r = 0; r < requests; r++) {
            if (count(r) < 0 || count(r) > length[r])
                throw std::invalid_argument("request " + std::to_string(r) + " has more tokens than keys");
            const std::int64_t blocks = (length[r] + block_size - 1) / block_size;
            if (blocks > width)
                throw std::invalid_argument("request " + std::to_string(r) + " has more keys than its pages hold");
            if (count(r) == 0) continue;
            for (std::int64_t b = 0; b < blocks; b++)
                if (pages(r)[b] < 0 || pages(r)[b] >= num_pages)
                    throw std::invalid_argument("page " + std::to_string(pages(r)[b]) + " of request " +
                                                std::to_string(r) + " is outside the pool of " +
                                                std::to_string(num_pages) + " pages");
        }
    }
};

}  // namespace openm3
