# cython: language_level=3, freethreading_compatible=True
"""The boundary to C: objects that own C memory, and one function per operation of a layer.

Sizes are checked here, once per call; below this line C only asserts. Every operation releases the GIL.
Objects are not locked: one thread at a time may use a Pool and what is computed with it.
"""

import os

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memmove, memset

from phi3c cimport _csrc as c

from phi3c.errors import InvalidParameterError

TILE = c.PHI3C_TILE
MAX_HEAD_DIM = c.PHI3C_MAX_HEAD_DIM


# -- instruction sets

def available_isas() -> tuple[str, ...]:
    """Names of the instruction sets this machine can run, worst first."""
    names, i = [], 0
    while c.phi3c_available_isa(i) != NULL:
        names.append(c.phi3c_available_isa(i).decode())
        i += 1
    return tuple(names)


def isa() -> str:
    """Name of the instruction set in use."""
    return c.phi3c_isa().decode()


def use_isa(name: str | None) -> None:
    """Choose kernels by name; None chooses the best.

    Raises:
        ValueError: unknown here, or this machine cannot run it; the message lists those it can.
    """
    cdef bytes encoded = name.encode() if name else b""
    if c.phi3c_init(<const char *> encoded if name else NULL) != 0:
        raise ValueError(f"instruction set {name!r} is unknown or not available; this machine can run: "
                         + ", ".join(available_isas()))


def cpu_features() -> str:
    """CPU features found, space-separated."""
    c.phi3c_available_isa(0)
    return c.phi3c_cpu_features().decode()


try:
    use_isa(os.environ.get("PHI3C_ISA"))
except ValueError as error:
    raise InvalidParameterError(f"PHI3C_ISA: {error}") from None


# -- objects

cdef class Pool:
    """Threads that share the work of every operation; `size` of them, the caller's included."""

    cdef c.phi3c_pool *pool
    cdef readonly int size

    def __cinit__(self, int size):
        if not 1 <= size <= 1024:
            raise ValueError(f"a pool has 1 to 1024 threads, not {size}")
        with nogil:
            self.pool = c.phi3c_pool_new(size)
        if self.pool == NULL:
            raise MemoryError(f"cannot start {size} threads")
        self.size = size

    def __dealloc__(self):
        with nogil:
            c.phi3c_pool_free(self.pool)


cdef class ReadAhead:
    """Reads mapped files, for a thread that does nothing else."""

    cdef c.atomic_word stopped

    def run(self, const uint8_t[::1] file not None) -> None:
        """Return when pages of all of `file` are mapped into this process, or after stop()."""
        if file.shape[0]:
            with nogil:
                c.phi3c_read_ahead(&file[0], file.shape[0], &self.stopped)

    def stop(self) -> None:
        """From any thread: have run() return now, or as soon as it is called."""
        c.phi3c_stop(&self.stopped)


cdef class Arena:
    """Zeroed memory for packed weights, handed out front to back in pieces of 64 bytes."""

    cdef uint8_t *memory
    cdef readonly size_t n_bytes
    cdef readonly size_t used

    def __cinit__(self, size_t n_bytes):
        self.memory = <uint8_t *> c.phi3c_alloc(n_bytes)
        if self.memory == NULL:
            raise MemoryError(f"cannot allocate {n_bytes} bytes for weights")
        self.n_bytes = n_bytes

    def __dealloc__(self):
        c.phi3c_free(self.memory, self.n_bytes)

    cdef uint8_t *take(self, size_t n_bytes) except NULL:
        cdef uint8_t *piece = self.memory + self.used
        if n_bytes > self.n_bytes - self.used:
            raise ValueError(f"arena of {self.n_bytes} bytes has no room for {n_bytes} more")
        self.used += (n_bytes + 63) // 64 * 64
        return piece


cdef class Rows:
    """A float32 matrix (rows, columns) in C memory; numpy.asarray(rows) shares it."""

    cdef float *f32
    cdef readonly Py_ssize_t rows
    cdef readonly Py_ssize_t columns
    cdef Py_ssize_t shape[2]
    cdef Py_ssize_t strides[2]

    def __cinit__(self, Py_ssize_t rows, Py_ssize_t columns, *args):
        if rows < 1 or columns < 1:
            raise ValueError(f"a matrix of {rows} x {columns}")
        self.rows, self.columns = rows, columns
        self.shape[0], self.shape[1] = rows, columns
        self.strides[0], self.strides[1] = columns * 4, 4
        self.f32 = <float *> c.phi3c_alloc(rows * columns * 4)
        if self.f32 == NULL:
            raise MemoryError(f"cannot allocate {rows} x {columns} floats")

    def __dealloc__(self):
        c.phi3c_free(self.f32, self.rows * self.columns * 4)

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        buffer.buf = self.f32
        buffer.obj = self
        buffer.len = self.rows * self.columns * 4
        buffer.readonly = 0
        buffer.itemsize = 4
        buffer.format = "f"
        buffer.ndim = 2
        buffer.shape = self.shape
        buffer.strides = self.strides
        buffer.suboffsets = NULL
        buffer.internal = NULL

    def __releasebuffer__(self, Py_buffer *buffer):
        pass


cdef class Activation(Rows):
    """Rows that matrices are multiplied with: floats and, kept in step, their quantised form."""

    cdef uint8_t *x8
    cdef uint8_t *outliers

    def __cinit__(self, Py_ssize_t rows, Py_ssize_t columns, *args):
        if columns % 32:
            raise ValueError(f"{columns} columns: activations have a multiple of 32")
        self.x8 = <uint8_t *> c.phi3c_alloc(rows * c.phi3c_x8_bytes(columns))
        self.outliers = <uint8_t *> c.phi3c_alloc(c.phi3c_outlier_bytes(rows, columns))
        if self.x8 == NULL or self.outliers == NULL:
            raise MemoryError(f"cannot allocate {rows} x {columns} activations")

    def __dealloc__(self):
        c.phi3c_free(self.x8, self.rows * c.phi3c_x8_bytes(self.columns))
        c.phi3c_free(self.outliers, c.phi3c_outlier_bytes(self.rows, self.columns))

    cdef c.phi3c_activation view(self) noexcept nogil:
        cdef c.phi3c_activation view
        view.f32, view.x8, view.outliers, view.columns = self.f32, self.x8, self.outliers, self.columns
        return view


cdef class Matrix:
    """Packed weights (rows, columns), made of segments that may differ in type.

    `append` packs rows into the arena; `append_packed` borrows panels that lie elsewhere, such as in a mapped
    file, and keeps their buffer alive. A matrix of borrowed panels needs no arena.
    """

    cdef c.phi3c_segment *segments
    cdef int n_segments
    cdef Arena arena
    cdef list borrowed
    cdef readonly Py_ssize_t rows
    cdef readonly Py_ssize_t columns

    def __cinit__(self, Arena arena, Py_ssize_t columns):
        self.arena, self.columns, self.borrowed = arena, columns, []

    def __dealloc__(self):
        free(self.segments)

    def append(self, const uint8_t[::1] data not None, int type, Py_ssize_t rows, const int64_t[::1] order,
               Pool pool not None) -> None:
        """Pack `rows` rows of GGUF blocks below those already there.

        Args:
            data: the rows, block after block.
            type: ggml's type id.
            order: (rows,) which row of data becomes row i; None keeps the order of the file.
        """
        check_blocks(data, type, rows, self.columns, order)
        if self.arena is None:
            raise ValueError("a matrix without an arena has no room for rows")
        cdef uint8_t *panels = self.arena.take(c.phi3c_packed_bytes(type, rows, self.columns))
        cdef const int64_t *order_pointer = NULL if order is None else &order[0]
        with nogil:
            c.phi3c_pack(panels, &data[0], type, rows, self.columns, order_pointer, pool.pool)
        self.add_segment(panels, type, rows)

    def append_packed(self, const uint8_t[::1] panels not None, int type, Py_ssize_t rows) -> None:
        """Put packed rows below those already there: panels as `pack` makes them, aligned to 64 bytes."""
        check_type(type, rows, self.columns)
        if <size_t> panels.shape[0] != c.phi3c_packed_bytes(type, rows, self.columns):
            raise ValueError(f"{panels.shape[0]} bytes: not {rows} packed rows x {self.columns}, type {type}")
        if <size_t> &panels[0] % 64:
            raise ValueError("panels begin at a multiple of 64 bytes")
        self.add_segment(&panels[0], type, rows)
        self.borrowed.append(panels)

    cdef int add_segment(self, const uint8_t *panels, int type, Py_ssize_t rows) except -1:
        cdef void *grown = realloc(self.segments, (self.n_segments + 1) * sizeof(c.phi3c_segment))
        if grown == NULL:
            raise MemoryError("cannot allocate a segment")
        self.segments = <c.phi3c_segment *> grown
        self.segments[self.n_segments].type = type
        self.segments[self.n_segments].rows = rows
        self.segments[self.n_segments].panels = panels
        self.n_segments += 1
        self.rows += rows
        return 0

    def unpack_row(self, Py_ssize_t row) -> tuple[int, bytes]:
        """Type id and GGUF blocks of a row."""
        cdef int i = 0
        if not 0 <= row < self.rows:
            raise IndexError(f"row {row} of {self.rows}")
        while row >= self.segments[i].rows:
            row -= self.segments[i].rows
            i += 1
        cdef int type = self.segments[i].type
        blocks = bytearray(self.columns // c.phi3c_block_columns(type) * c.phi3c_block_bytes(type))
        cdef uint8_t[::1] view = blocks
        c.phi3c_unpack_row(&view[0], self.segments[i].panels, type, row, self.columns)
        return type, bytes(blocks)


cdef int check_type(int type, Py_ssize_t rows, Py_ssize_t columns) except -1:
    cdef Py_ssize_t block = c.phi3c_block_columns(type)
    if block == 0 or columns < 1 or columns % block or columns % 32:
        raise ValueError(f"no packing for type {type} with {columns} columns")
    if rows < 1:
        raise ValueError(f"a matrix of {rows} rows")
    return 0


cdef int check_blocks(const uint8_t[::1] data, int type, Py_ssize_t rows, Py_ssize_t columns,
                      const int64_t[::1] order) except -1:
    cdef Py_ssize_t i
    check_type(type, rows, columns)
    if data.shape[0] != columns // c.phi3c_block_columns(type) * c.phi3c_block_bytes(type) * rows:
        raise ValueError(f"{data.shape[0]} bytes: not {rows} rows of {columns} columns, type {type}")
    if order is not None:
        if order.shape[0] != rows:
            raise ValueError(f"order names {order.shape[0]} of {rows} rows")
        for i in range(rows):
            if not 0 <= order[i] < rows:
                raise ValueError(f"order[{i}] is {order[i]}: there are {rows} rows")
    return 0


def pack(uint8_t[::1] panels not None, const uint8_t[::1] data not None, int type, Py_ssize_t rows,
         Py_ssize_t columns, const int64_t[::1] order, Pool pool not None) -> None:
    """Pack rows of GGUF blocks into `panels`, which they fill; arguments as for Matrix.append."""
    check_blocks(data, type, rows, columns, order)
    if <size_t> panels.shape[0] != c.phi3c_packed_bytes(type, rows, columns):
        raise ValueError(f"{panels.shape[0]} bytes: not {rows} packed rows of {columns}, type {type}")
    cdef const int64_t *order_pointer = NULL if order is None else &order[0]
    with nogil:
        c.phi3c_pack(&panels[0], &data[0], type, rows, columns, order_pointer, pool.pool)


def encode(uint8_t[::1] blocks not None, int type, const uint8_t[::1] data not None, int data_type,
           Py_ssize_t n, Pool pool not None) -> None:
    """Write n weights, blocks of `data_type`, as blocks of `type`, which they fill.

    Raises:
        OverflowError: a weight is not finite or, unless `type` is F32 or BF16, beyond half precision.
    """
    cdef int status
    check_blocks(data, data_type, 1, n, None)
    check_blocks(blocks, type, 1, n, None)
    if not c.phi3c_has_encoder(type):
        raise ValueError(f"no quantiser for type {type}")
    with nogil:
        status = c.phi3c_encode(&blocks[0], type, &data[0], data_type, n, pool.pool)
    if status != 0:
        raise OverflowError("a weight is not finite, or beyond the range of half precision")


def packed_bytes(int type, Py_ssize_t rows, Py_ssize_t columns) -> int:
    """Bytes a packed (rows, columns) matrix of `type` takes in an arena; 0 for a type without kernels."""
    if not c.phi3c_block_columns(type):
        return 0
    return (c.phi3c_packed_bytes(type, rows, columns) + 63) // 64 * 64


def has_kernels(int type) -> bool:
    """Whether matrices of this ggml type id can be packed and multiplied."""
    return c.phi3c_block_columns(type) > 0


cdef class Pages:
    """The pool of KV pages, all of `page_bytes` bytes, addressed by small integers."""

    cdef uint8_t **pages
    cdef list free_ids
    cdef readonly Py_ssize_t count
    cdef readonly size_t page_bytes

    def __cinit__(self, size_t page_bytes):
        self.page_bytes = page_bytes
        self.free_ids = []

    def __dealloc__(self):
        for i in range(self.count):
            c.phi3c_free(self.pages[i], self.page_bytes)
        free(self.pages)

    def take(self) -> int:
        """Id of a page nobody holds; its contents are old or zero."""
        if self.free_ids:
            return self.free_ids.pop()
        cdef void *grown = realloc(self.pages, (self.count + 1) * sizeof(uint8_t *))
        if grown == NULL:
            raise MemoryError("cannot grow the table of KV pages")
        self.pages = <uint8_t **> grown
        self.pages[self.count] = <uint8_t *> c.phi3c_alloc(self.page_bytes)
        if self.pages[self.count] == NULL:
            raise MemoryError(f"cannot allocate a KV page of {self.page_bytes} bytes")
        self.count += 1
        return self.count - 1

    def give_back(self, int page) -> None:
        """The page may be taken again."""
        self.free_ids.append(page)

    @property
    def in_use(self) -> int:
        """Pages taken and not given back."""
        return self.count - len(self.free_ids)


cdef class Heads:
    """The attention of a model: head counts and sizes, rotary dimensions, window (0: none), type of cache."""

    cdef c.phi3c_attention attention
    cdef readonly Py_ssize_t qkv_columns
    cdef readonly Py_ssize_t columns

    def __cinit__(self, int head_count, int head_count_kv, int head_dim, int rope_dims, int window,
                  int kv_type):
        if (head_dim < 16 or head_dim % 16 or head_dim > MAX_HEAD_DIM or head_count_kv < 1
                or head_count % head_count_kv):
            raise ValueError(f"{head_count} heads, {head_count_kv} kv heads of {head_dim}")
        if rope_dims < 2 or rope_dims % 2 or rope_dims > head_dim or window < 0:
            raise ValueError(f"{rope_dims} rotary dimensions of {head_dim}, window {window}")
        if not c.phi3c_kv_bytes(kv_type, head_dim):
            raise ValueError(f"no cache of type {kv_type} for heads of {head_dim}")
        memset(&self.attention, 0, sizeof(c.phi3c_attention))
        self.attention.head_count = head_count
        self.attention.head_count_kv = head_count_kv
        self.attention.head_dim = head_dim
        self.attention.rope_dims = rope_dims
        self.attention.window = window
        self.attention.kv_type = kv_type
        self.columns = head_count * head_dim
        self.qkv_columns = (head_count + 2 * head_count_kv) * head_dim

    def page_bytes(self, int block_count) -> int:
        """Bytes of a KV page for `block_count` layers."""
        cdef size_t kv_bytes = c.phi3c_kv_bytes(self.attention.kv_type, self.attention.head_dim)
        return block_count * self.attention.head_count_kv * kv_bytes


cdef class RopeTable:
    """cos and sin for positions 0, 1, ..., times `scale`: a table (positions, rope_dims / 2) for each set.

    Args:
        frequency: (n_sets, rope_dims / 2) radians per position.
    """

    cdef const double[:, ::1] frequency
    cdef float scale
    cdef c.phi3c_rope *ropes
    cdef Py_ssize_t *positions

    def __cinit__(self, const double[:, ::1] frequency not None, float scale):
        self.frequency, self.scale = frequency, scale
        self.ropes = <c.phi3c_rope *> calloc(frequency.shape[0], sizeof(c.phi3c_rope))
        self.positions = <Py_ssize_t *> calloc(frequency.shape[0], sizeof(Py_ssize_t))
        if self.ropes == NULL or self.positions == NULL:
            raise MemoryError(f"cannot allocate {frequency.shape[0]} rotary tables")

    def __dealloc__(self):
        cdef Py_ssize_t i
        for i in range(self.frequency.shape[0] if self.ropes != NULL else 0):
            free(self.ropes[i].cosines)
            free(self.ropes[i].sines)
        free(self.ropes)
        free(self.positions)

    def extend(self, Py_ssize_t rope, Py_ssize_t positions) -> None:
        """Make the table of set `rope` at least `positions` long."""
        if not 0 <= rope < self.frequency.shape[0]:
            raise ValueError(f"no rotary set {rope} of {self.frequency.shape[0]}")
        cdef Py_ssize_t n = self.frequency.shape[1], first = self.positions[rope]
        cdef const double *frequency = &self.frequency[rope, 0]
        cdef c.phi3c_rope *table = &self.ropes[rope]
        if positions <= first:
            return
        positions = max(positions, 2 * first, 512)
        table.cosines = <float *> grow(table.cosines, positions * n * 4)
        table.sines = <float *> grow(table.sines, positions * n * 4)
        with nogil:
            c.phi3c_rope_table(table.cosines + first * n, table.sines + first * n, frequency, first,
                               positions - first, n, self.scale)
        self.positions[rope] = positions

    cdef bint covers(self, const int32_t[:, ::1] spans):
        cdef Py_ssize_t i
        for i in range(spans.shape[0]):
            if (not 0 <= spans[i, 4] < self.frequency.shape[0]
                    or <Py_ssize_t> spans[i, 3] + spans[i, 2] > self.positions[spans[i, 4]]):
                return False
        return True


cdef void *grow(void *memory, size_t n_bytes) except NULL:
    cdef void *grown = realloc(memory, n_bytes)
    if grown == NULL:
        raise MemoryError(f"cannot allocate {n_bytes} bytes")
    return grown


cdef class Batch:
    """Which rows of a forward pass belong to which sequence.

    Args:
        spans: (n_spans, 5) int32: sequence, first row, number of rows, position of the first row, and which
            set of the rotary table turns them.
        page_tables: (n_sequences, pages) int32: page ids by position / 64; any value where no row looks.
        window: of the attention, 0 for none.
    """

    cdef const int32_t[:, ::1] spans
    cdef const int32_t[:, ::1] page_tables
    cdef readonly Py_ssize_t n_rows
    cdef int window

    def __cinit__(self, const int32_t[:, ::1] spans not None, const int32_t[:, ::1] page_tables not None,
                  Pages pages not None, int window):
        cdef Py_ssize_t i, page, rows = 0, begin, end
        if spans.shape[0] < 1 or spans.shape[1] != 5:
            raise ValueError("spans are rows of (sequence, row, n, position, rope)")
        for i in range(spans.shape[0]):
            end = <Py_ssize_t> spans[i, 3] + spans[i, 2]
            if (not 0 <= spans[i, 0] < page_tables.shape[0] or spans[i, 1] != rows or spans[i, 2] < 1
                    or spans[i, 3] < 0):
                raise ValueError(f"span {i} is out of place")
            if end > page_tables.shape[1] * c.PHI3C_TILE:
                raise ValueError(f"span {i} ends at position {end}, beyond its page table")
            begin = max(0, spans[i, 3] - window + 1) if window else 0
            for page in range(begin // c.PHI3C_TILE, (end - 1) // c.PHI3C_TILE + 1):
                if not 0 <= page_tables[spans[i, 0], page] < pages.count:
                    raise ValueError(f"span {i} has no page {page}")
            rows += spans[i, 2]
        self.spans, self.page_tables, self.n_rows, self.window = spans, page_tables, rows, window


# -- operations

cdef int check(bint fits, str what) except -1:
    if not fits:
        raise ValueError(f"{what}: shapes do not fit")
    return 0


def embed(Rows out not None, const uint8_t[::1] data not None, int type,
          const int64_t[::1] ids not None) -> None:
    """out[i] = weights of row ids[i] of a matrix of GGUF blocks (rows, out.columns)."""
    cdef Py_ssize_t block = c.phi3c_block_columns(type), i
    check(block > 0 and out.columns % block == 0 and ids.shape[0] <= out.rows, "embed")
    cdef Py_ssize_t row_bytes = out.columns // block * c.phi3c_block_bytes(type)
    for i in range(ids.shape[0]):
        if not 0 <= ids[i] < data.shape[0] // row_bytes:
            raise ValueError(f"token id {ids[i]} is not in the vocabulary of {data.shape[0] // row_bytes}")
        c.phi3c_dequantize_row(out.f32 + i * out.columns, &data[ids[i] * row_bytes], type, out.columns)


def embed_packed(Rows out not None, Matrix weights not None, const int64_t[::1] ids not None) -> None:
    """out[i] = weights of row ids[i] of a packed matrix."""
    cdef Py_ssize_t i
    cdef int type
    cdef const uint8_t[::1] blocks
    check(weights.columns == out.columns and ids.shape[0] <= out.rows, "embed")
    for i in range(ids.shape[0]):
        if not 0 <= ids[i] < weights.rows:
            raise ValueError(f"token id {ids[i]} is not in the vocabulary of {weights.rows}")
        type, blocks = weights.unpack_row(ids[i])
        c.phi3c_dequantize_row(out.f32 + i * out.columns, &blocks[0], type, out.columns)


def keep_rows(Rows x not None, const int64_t[::1] rows not None) -> None:
    """Move row rows[i] to row i; rows are ascending."""
    cdef Py_ssize_t i, x8_bytes = c.phi3c_x8_bytes(x.columns)
    cdef uint8_t *x8 = (<Activation> x).x8 if isinstance(x, Activation) else NULL
    for i in range(rows.shape[0]):
        if not i <= rows[i] < x.rows:
            raise ValueError(f"row {rows[i]} cannot become row {i} of {x.rows}")
        memmove(x.f32 + i * x.columns, x.f32 + rows[i] * x.columns, x.columns * 4)
        if x8 != NULL:
            memmove(x8 + i * x8_bytes, x8 + rows[i] * x8_bytes, x8_bytes)


def rms_norm(Activation out not None, Rows x not None, Rows weight not None, float eps, Py_ssize_t n,
             Pool pool not None) -> None:
    """out[:n] = x[:n] / sqrt(mean(x^2) + eps) * weight."""
    check(0 < n <= min(out.rows, x.rows) and out.columns == x.columns == weight.columns, "rms_norm")
    with nogil:
        c.phi3c_rms_norm(out.view(), x.f32, weight.f32, eps, n, pool.pool)


def quantize(Activation x not None, Py_ssize_t n, Pool pool not None) -> None:
    """Bring x[:n] in step with its floats, where numpy has written them; operations do that themselves."""
    check(0 < n <= x.rows, "quantize")
    with nogil:
        c.phi3c_quantize(x.view(), n, pool.pool)


def matmul(Rows out not None, Matrix weights not None, Activation x not None, Py_ssize_t n, bint add,
           Pool pool not None) -> None:
    """out[:n] = x[:n] weights^T, or += when `add` is set."""
    check(0 < n <= min(out.rows, x.rows) and x.columns == weights.columns and out.columns == weights.rows,
          "matmul")
    with nogil:
        c.phi3c_matmul(out.f32, weights.segments, weights.n_segments, x.view(), n, add, pool.pool)


def gate_up(Activation out not None, Matrix weights not None, Activation x not None, Py_ssize_t n,
            Pool pool not None) -> None:
    """out[:n] = silu(gate) * up, gate and up being the halves of the rows of x[:n] weights^T.

    Gate and up lie in one segment of the weights, or in one each.
    """
    check(0 < n <= min(out.rows, x.rows) and x.columns == weights.columns
          and 2 * out.columns == weights.rows and weights.n_segments <= 2
          and weights.segments[weights.n_segments - 1].rows * weights.n_segments == weights.rows, "gate_up")
    with nogil:
        c.phi3c_gate_up(out.view(), weights.segments, weights.n_segments, x.view(), n, pool.pool)


def rope_append(Heads heads not None, int layer, Rows qkv not None, Batch batch not None,
                Pages pages not None, RopeTable rope not None, Pool pool not None) -> None:
    """Rotate q and k of qkv in place, scale q by 1/sqrt(head_dim), write k and v to the batch's pages."""
    check(batch.n_rows <= qkv.rows and qkv.columns == heads.qkv_columns
          and batch.window == heads.attention.window and rope.covers(batch.spans)
          and 2 * rope.frequency.shape[1] == heads.attention.rope_dims
          and heads.page_bytes(layer + 1) <= pages.page_bytes, "rope_append")
    cdef c.phi3c_attention a = at_layer(heads, layer, batch, pages)
    cdef const c.phi3c_span *spans = <const c.phi3c_span *> &batch.spans[0, 0]
    cdef int n_spans = <int> batch.spans.shape[0]
    with nogil:
        c.phi3c_rope_append(&a, qkv.f32, spans, n_spans, rope.ropes, pool.pool)


def attend(Activation out not None, Heads heads not None, int layer, Rows qkv not None, Batch batch not None,
           Pages pages not None, Pool pool not None) -> None:
    """out = softmax(q k) v of every row over the keys its position and window let it see."""
    check(batch.n_rows <= min(out.rows, qkv.rows) and out.columns == heads.columns
          and qkv.columns == heads.qkv_columns and batch.window == heads.attention.window
          and heads.page_bytes(layer + 1) <= pages.page_bytes, "attend")
    cdef c.phi3c_attention a = at_layer(heads, layer, batch, pages)
    cdef const c.phi3c_span *spans = <const c.phi3c_span *> &batch.spans[0, 0]
    cdef int n_spans = <int> batch.spans.shape[0]
    with nogil:
        c.phi3c_attend(out.view(), &a, qkv.f32, spans, n_spans, pool.pool)


cdef c.phi3c_attention at_layer(Heads heads, int layer, Batch batch, Pages pages) noexcept:
    cdef c.phi3c_attention a = heads.attention
    a.layer = layer
    a.pages = pages.pages
    a.page_tables = &batch.page_tables[0, 0]
    a.table_stride = batch.page_tables.shape[1]
    return a


# -- limits

def read(Matrix matrix not None, Pool pool not None) -> int:
    """Read a matrix, each segment to its last whole 64 bytes; the XOR of its 32-bit words."""
    cdef uint32_t folded = 0
    cdef c.phi3c_segment segment
    cdef size_t n_bytes
    cdef int i
    for i in range(matrix.n_segments):
        segment = matrix.segments[i]
        n_bytes = c.phi3c_packed_bytes(segment.type, segment.rows, matrix.columns)
        with nogil:
            folded ^= c.phi3c_read(segment.panels, n_bytes // 64 * 64, pool.pool)
    return folded


def peak(int64_t n_bursts, Pool pool not None) -> int:
    """Multiply int8 out of registers, some 20 us a burst; how many multiply-adds, 0 where isa() has none."""
    cdef int64_t n
    with nogil:
        n = c.phi3c_peak(n_bursts, pool.pool)
    return n


# -- scores

def log_sum_exp(double[::1] out not None, const float[:, ::1] logits not None, Pool pool not None) -> None:
    """out[i] = log of the sum of exp(logits[i]); NaN where a logit of the row is not finite."""
    cdef Py_ssize_t n = logits.shape[0], n_vocab = logits.shape[1]
    check(0 < n == out.shape[0] and 0 < n_vocab < 1 << 31, "log_sum_exp")
    with nogil:
        c.phi3c_log_sum_exp(&out[0], &logits[0, 0], n, n_vocab, pool.pool)


def kl_divergence(double[::1] out not None, const uint16_t[:, :] steps not None,
                  const float[::1] scales not None, const float[::1] mins not None,
                  const float[:, ::1] logits not None, const double[::1] log_sums not None,
                  Pool pool not None) -> None:
    """out[i] = KL divergence of row i from log-probabilities mins[i] + scales[i] * steps[i]."""
    cdef Py_ssize_t n = logits.shape[0], n_vocab = logits.shape[1]
    check(0 < n == out.shape[0] == steps.shape[0] == scales.shape[0] == mins.shape[0] == log_sums.shape[0]
          and 0 < n_vocab == steps.shape[1] and steps.strides[1] == 2 and steps.strides[0] % 2 == 0,
          "kl_divergence")
    cdef c.phi3c_base base
    base.steps, base.stride = &steps[0, 0], steps.strides[0] // 2
    base.scales, base.mins = &scales[0], &mins[0]
    with nogil:
        c.phi3c_kl_divergence(&out[0], base, &logits[0, 0], &log_sums[0], n, n_vocab, pool.pool)


# -- sampling

cdef class SamplerChain:
    """Penalties, filters, temperature and draw, with the scratch memory they need."""

    cdef c.phi3c_sampling params
    cdef void *scratch
    cdef size_t n_bytes

    def __cinit__(self, double temperature, int32_t top_k, double top_p, double min_p, float repeat_penalty):
        self.params.temperature, self.params.top_k = temperature, top_k
        self.params.top_p, self.params.min_p = top_p, min_p
        self.params.repeat_penalty = repeat_penalty

    def __dealloc__(self):
        free(self.scratch)

    cdef int prepare(self, const float[::1] logits) except -1:
        check(0 < logits.shape[0] < 1 << 20, "logits")  # the weights of so many sum to less than 2^64
        cdef size_t n_bytes = c.phi3c_sample_scratch_bytes(logits.shape[0])
        if n_bytes > self.n_bytes:
            self.scratch = grow(self.scratch, n_bytes)
            self.n_bytes = n_bytes
        return 0

    def draw(self, const float[::1] logits not None, const int32_t[::1] recent not None, uint64_t seed,
             uint64_t counter) -> int:
        """Id of the token drawn from logits (vocab,), given the `recent` ids; -1 if a logit is not finite."""
        cdef int32_t token
        cdef const int32_t *ids = &recent[0] if recent.shape[0] else NULL
        self.prepare(logits)
        with nogil:
            token = c.phi3c_sample(&logits[0], logits.shape[0], ids, recent.shape[0], &self.params, seed,
                                   counter, self.scratch)
        return token

    def top_logprobs(self, const float[::1] logits not None, int32_t token, int32_t n_top) -> tuple:
        """Log-probability of `token`, NaN if a logit is not finite, and the n_top best (id, logprob)."""
        cdef float logprob
        check(0 <= token < logits.shape[0] and 0 <= n_top <= logits.shape[0], "top_logprobs")
        self.prepare(logits)
        cdef c.phi3c_candidate *top = <c.phi3c_candidate *> calloc(n_top + 1, sizeof(c.phi3c_candidate))
        if top == NULL:
            raise MemoryError(f"cannot allocate {n_top} candidates")
        with nogil:
            logprob = c.phi3c_top_logprobs(&logits[0], logits.shape[0], token, n_top, top, self.scratch)
        best = [(top[i].id, top[i].logit) for i in range(n_top)]
        free(top)
        return logprob, best


def philox4x32(const uint32_t[::1] counter not None,
               const uint32_t[::1] key not None) -> tuple[int, int, int, int]:
    """Philox4x32-10 of a counter of four words and a key of two."""
    cdef uint32_t out[4]
    check(counter.shape[0] == 4 and key.shape[0] == 2, "philox4x32")
    c.phi3c_philox4x32(&counter[0], &key[0], out)
    return out[0], out[1], out[2], out[3]


def expf(float[::1] x not None) -> None:
    """x = exp(x), in place: the exponential of softmax and silu."""
    cdef Py_ssize_t i
    with nogil:
        for i in range(x.shape[0]):
            x[i] = c.phi3c_expf(x[i])
