"""Which request a tile or a token of a packed batch belongs to, found on the device: the host never waits to know."""

import triton
import triton.language as tl


@triton.jit
def request_of_tile(p_start, num_requests, first, last, i_tile, TOKENS: tl.constexpr):
    """The request of a tile of TOKENS tokens of one request, where only tokens first..last-1 of the batch take part.

    Request r's tiles begin at number `start // TOKENS + r`, which leaves each at least as many as it needs:
    `(last - first) // TOKENS + num_requests` programs serve any batch, and those without a token have nothing to do.
    """
    low = 0
    high = num_requests
    while low < high:
        middle = (low + high) // 2
        start = tl.minimum(tl.maximum(tl.load(p_start + middle), first), last) - first
        if start // TOKENS + middle <= i_tile:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit
def requests_of_tokens(p_start, num_requests, num_steps, token):
    """The request of each token of a tile, by bisection in `num_requests.bit_length()` steps."""
    low = tl.zeros_like(token)
    high = low + num_requests
    for _ in range(num_steps):
        middle = (low + high) // 2
        at_or_after = tl.load(p_start + middle) <= token
        low = tl.where(at_or_after, middle, low)
        high = tl.where(at_or_after, high, middle)
    return low
