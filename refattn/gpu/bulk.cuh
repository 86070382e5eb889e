// Copies by the bulk tensor engine into a warp's own ring, for decode.cu: an mbarrier a slot, boxes of 16 rows by 64
// columns with the 128-byte swizzle.

struct alignas(64) TensorMap { char bytes[128]; };

DEVICE void barrier_init(u32 bar, u32 count)
{ asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory"); }
DEVICE void barrier_expect(u32 bar, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
DEVICE void barrier_wait(u32 bar, u32 parity) {
    asm volatile("{\n.reg .pred done;\nWAIT:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra "
                 "DONE;\nbra WAIT;\nDONE:\n}" ::"r"(bar),
                 "r"(parity)
                 : "memory");
}
// What ordinary stores wrote is there for the engine, barriers too.
DEVICE void fence_for_copies() {
    asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}
// Columns past the tensor's, and rows past its last one, arrive as zeros.
template <int WIDTH> DEVICE void copy_rows(u32 to, const TensorMap* map, u32 bar, int row, int head, int batch) {
    UNROLL for (int i = 0; i < WIDTH / 64; i++)
        asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, "
                     "%4, %5, %6}], [%2];" ::"r"(to + i * 2048),
                     "l"(map), "r"(bar), "r"(64 * i), "r"(row), "r"(head), "r"(batch)
                     : "memory");
}
// A tile of 16 rows in boxes of 64 columns: where a chunk of 16 bytes lies, and 16 columns on from it.
template <int WIDTH> struct Boxes {
    static DEVICE u32 chunk(int row, int c) { return c / 8 * 2048 + row * 128 + ((c % 8 ^ (row & 7)) << 4); }
    static DEVICE u32 step(u32 start, int k) { return (start ^ (k % 4 << 5)) + k / 4 * 2048; }
};
