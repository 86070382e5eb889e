// ORDERED: a thread for each consumer waits for its turn at a half tile, and passes it on once the consumer's sums are
// there: the consumer waits for neither. The slot is not filled anew before the consumer has had its turn.
DEVICE void take_turns(u32 shared, const Sums& z, const Work& own, int half) {
    const u32 bars = shared + OFFSET_BARRIERS;
    for (Ring<STAGES> slot;; slot.advance()) {
        barrier_wait(bars + FULL_Q + 8 * slot.stage, slot.phase);
        const uint4 w = load_four(bars + WORK + 16 * slot.stage);
        if ((int)w.x < 0) return;
        unsigned *turn = z.turns + 2ll * w.y + half, here;
        do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(here) : "l"(turn) : "memory");
        while (here != w.w);
        barrier_arrive(bars + EMPTY_DQ + 8 * half);
        barrier_wait(bars + FULL_DQ + 8 * half, slot.stage);      // two stages: the parity of the tile
        __threadfence();                                          // of what the consumer's threads did before, too
        asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(turn), "r"(own.n + 1) : "memory");
    }
}
// A consumer's half of dq to half tile `at` of the sums; first: nobody's sums come before.
DEVICE void add_dq(const float (&dq)[NQ], const Sums& z, u32 bars, long long at, bool first, u32 parity) {
    float* to = z.sums + at * (HALF_BYTES / 4) + 4 * (threadIdx.x % 128);
    const u32 half = at % 2;
    if (ORDERED) barrier_wait(bars + EMPTY_DQ + 8 * half, parity);
#pragma unroll
    for (int i = 0; i < NQ; i += 4)
        if (ORDERED && first)
            *(float4*)(to + 128 * i) = make_float4(dq[i], dq[i + 1], dq[i + 2], dq[i + 3]);
        else
            asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};"
                         ::"l"(to + 128 * i), "f"(dq[i]), "f"(dq[i + 1]), "f"(dq[i + 2]), "f"(dq[i + 3]) : "memory");
    if (ORDERED) {
        __syncwarp();
        if (threadIdx.x % 32 == 0) barrier_arrive(bars + FULL_DQ + 8 * half);
    }
}
// Both consumers have all 64 keys: each computes S^T and dP^T for half of the rows, puts P^T and dS^T to shared memory,
// and has half of the columns of dk, dv and dq. dq goes to its sums from registers: shared memory is full.
DEVICE void consume(u32 shared, const Params& p, const Sums& z) {
    const u32 bars = shared + OFFSET_BARRIERS;
    const int half = __shfl_sync(~0u, threadIdx.x / 128, 0) - 1;
    const u64 desc_k = descriptor(shared, 16), desc_v = descriptor(shared + OFFSET_V, 16),
              desc_columns = descriptor(shared + half * (2 * BLOCK_N * 128), BLOCK_N * 128);   // K for dq
    float dk[NO], dv[NO];
#pragma unroll
    for (int i = 0; i < NO; i++) dk[i] = dv[i] = 0.f;
    Ring<STAGES> slot;
    barrier_wait(bars + FULL_KV, 0);
    for (;;) {
        barrier_wait(bars + FULL_Q + 8 * slot.stage, slot.phase);
        const uint4 w = load_four(bars + WORK + 16 * slot.stage);
        if ((int)w.x < 0) break;
        float s[NS], g[NS];
        u32 weights[NS / 2], slopes[NS / 2];
        const u32 q = shared + OFFSET_Q + slot.stage * Q_BYTES, dout = shared + OFFSET_DOUT + slot.stage * Q_BYTES,
                  stats = shared + OFFSET_STATS + slot.stage * STATS_BYTES + 256 * half + 16 * (threadIdx.x % 4),
                  pt = shared + OFFSET_P + slot.stage * S_BYTES, ds = shared + OFFSET_DS + slot.stage * S_BYTES;
        wgmma_fence();
        product(s, desc_k, descriptor(q + half * 4096, 16));
        barrier_wait(bars + FULL_DOUT + 8 * slot.stage, slot.phase);
        wgmma_fence();
        product(g, desc_v, descriptor(dout + half * 4096, 16));
        wgmma_wait<1>();
        pin(s);
        weigh(s, weights, bars, stats, slot.stage, w.z, p);
        put(pt, weights);
        wgmma_wait<0>();
        pin(g);
        differentiate(slopes, s, g, stats);
        put(ds, slopes);
        fence_async();
        sync(SHARED_DS, 256);
        float dq[NQ];
        const u64 columns_q = descriptor(q + half * (2 * BLOCK_M * 128), BLOCK_M * 128),
                  columns_dout = descriptor(dout + half * (2 * BLOCK_M * 128), BLOCK_M * 128),
                  desc_p = descriptor(pt, 16), desc_ds = descriptor(ds, 16);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < BLOCK_N / 16; i++) {
            const u64 da = desc_ds + ((i * 2048) >> 4), db = desc_columns + ((i * 2048) >> 4);
            if (i == 0) query_first(dq, da, db);
            else query_next(dq, da, db);
        }
        wgmma_commit();
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < BLOCK_M / 16; i++) {
            const u32 along = (i * 32) >> 4, rows = (i * 2048) >> 4;
            add_shared(dv, desc_p + along, columns_dout + rows);
            add_shared(dk, desc_ds + along, columns_q + rows);
        }
        wgmma_commit();
        wgmma_wait<1>();
        pin(dq);
        add_dq(dq, z, bars, 2ll * w.y + half, w.w == 0, slot.stage);
        wgmma_wait<0>();
        pin(dk);
        pin(dv);
        barrier_arrive(bars + EMPTY + 8 * slot.stage);         // every thread: all have read the statistics
        slot.advance();
    }
    finish(dk, dv, p, z, threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4, half * 128);
}
