# Everything that Python reaches in C, name for name.

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t


cdef extern from "phi3c.h" nogil:
    enum: PHI3C_N_TYPES
    enum: PHI3C_TILE
    enum: PHI3C_MAX_HEAD_DIM

    int phi3c_init(const char *isa)
    const char *phi3c_isa()
    const char *phi3c_available_isa(int i)
    const char *phi3c_cpu_features()

    ctypedef struct phi3c_pool:
        pass
    phi3c_pool *phi3c_pool_new(int n_threads)
    void phi3c_pool_free(phi3c_pool *pool)

    ctypedef struct atomic_word:
        pass

    void *phi3c_alloc(size_t n_bytes)
    void phi3c_free(void *memory, size_t n_bytes)
    void phi3c_read_ahead(const uint8_t *file, size_t n_bytes, const atomic_word *stop)
    void phi3c_stop(atomic_word *stop)

    ctypedef struct phi3c_segment:
        int type
        int64_t rows
        const uint8_t *panels
    int phi3c_block_columns(int type)
    int phi3c_block_bytes(int type)
    size_t phi3c_packed_bytes(int type, int64_t rows, int64_t columns)
    void phi3c_pack(uint8_t *panels, const uint8_t *src, int type, int64_t rows, int64_t columns,
                    const int64_t *order, phi3c_pool *pool)
    void phi3c_unpack_row(uint8_t *blocks, const uint8_t *panels, int type, int64_t row, int64_t columns)
    void phi3c_dequantize_row(float *out, const uint8_t *blocks, int type, int64_t columns)
    int phi3c_has_encoder(int type)
    int phi3c_encode(uint8_t *out, int type, const uint8_t *data, int data_type, int64_t n, phi3c_pool *pool)

    size_t phi3c_x8_bytes(int64_t columns)
    size_t phi3c_outlier_bytes(int64_t n, int64_t columns)
    ctypedef struct phi3c_activation:
        float *f32
        uint8_t *x8
        uint8_t *outliers
        int64_t columns
    void phi3c_rms_norm(phi3c_activation out, const float *x, const float *weight, float eps, int64_t n,
                        phi3c_pool *pool)
    void phi3c_quantize(phi3c_activation x, int64_t n, phi3c_pool *pool)
    void phi3c_matmul(float *out, const phi3c_segment *segments, int n_segments, phi3c_activation x,
                      int64_t n, int add, phi3c_pool *pool)
    void phi3c_gate_up(phi3c_activation out, const phi3c_segment *segments, int n_segments,
                       phi3c_activation x, int64_t n, phi3c_pool *pool)

    void phi3c_rope_table(float *cosines, float *sines, const double *frequency, int64_t first, int64_t n,
                          int64_t n_frequencies, float scale)
    size_t phi3c_kv_bytes(int kv_type, int head_dim)
    ctypedef struct phi3c_attention:
        int head_count, head_count_kv, head_dim, rope_dims, window, kv_type, layer
        uint8_t **pages
        const int32_t *page_tables
        int64_t table_stride
    ctypedef struct phi3c_rope:
        float *cosines
        float *sines
    ctypedef struct phi3c_span:
        int32_t sequence, row, n, position, rope
    void phi3c_rope_append(const phi3c_attention *a, float *qkv, const phi3c_span *spans, int n_spans,
                           const phi3c_rope *ropes, phi3c_pool *pool)
    void phi3c_attend(phi3c_activation out, const phi3c_attention *a, const float *qkv,
                      const phi3c_span *spans, int n_spans, phi3c_pool *pool)

    void phi3c_log_sum_exp(double *out, const float *logits, int64_t n, int64_t n_vocab, phi3c_pool *pool)
    ctypedef struct phi3c_base:
        const uint16_t *steps
        int64_t stride
        const float *scales
        const float *mins
    void phi3c_kl_divergence(double *out, phi3c_base base, const float *logits, const double *log_sums,
                             int64_t n, int64_t n_vocab, phi3c_pool *pool)

    uint32_t phi3c_read(const uint8_t *memory, size_t n_bytes, phi3c_pool *pool)
    int64_t phi3c_peak(int64_t n_bursts, phi3c_pool *pool)


cdef extern from "sample.h" nogil:
    ctypedef struct phi3c_candidate:
        float logit
        int32_t id
    ctypedef struct phi3c_sampling:
        double temperature, top_p, min_p
        float repeat_penalty
        int32_t top_k
    size_t phi3c_sample_scratch_bytes(int32_t n_vocab)
    int32_t phi3c_sample(const float *logits, int32_t n_vocab, const int32_t *recent, int32_t n_recent,
                         const phi3c_sampling *params, uint64_t seed, uint64_t counter, void *scratch)
    float phi3c_top_logprobs(const float *logits, int32_t n_vocab, int32_t token, int32_t n_top,
                             phi3c_candidate *top, void *scratch)
    void phi3c_philox4x32(const uint32_t *counter, const uint32_t *key, uint32_t *out)

cdef extern from "expf.h" nogil:
    float phi3c_expf(float x)
