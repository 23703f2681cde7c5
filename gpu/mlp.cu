// A small network of linear layers and ReLU, and its gradient, by one kernel each, in the manner of the fully fused
// network that Instant NGP uses (Mueller et al. 2021, "Real-time neural radiance caching for path tracing", Sec. 4).
//
// `mlp.py` compiles this file at run time for the widths of one network; `nn.Sequential` is the reference. To read and
// write the numbers between two layers takes far longer than to compute them, so they stay in registers: a warp has 16
// points, and the result of a product of matrices lies where the next one wants its factor. (The factors of the
// weights' gradients pass through shared memory.) The gradient computes the layers once more instead of remembering
// them. What goes into a product is rounded to bfloat16; biases, sums and the
// last layer's result are in float32. Sums are always in the same order, so that results repeat bit by bit.
//
// Shapes: N points, P parameters, C channels of a layer's input, D of its output, L the layer. The compiler's options
// define CHANNELS, the widths from the first input to the last output, LAST_RELU, whether a ReLU follows the last
// layer, WARPS of a block, and SHARED, its bytes of shared memory. All widths are filled up with zeros to multiples
// of 16.

constexpr int WIDTHS[] = {CHANNELS};
constexpr int LAYERS = sizeof(WIDTHS) / sizeof(int) - 1;
constexpr int BLOCK_POINTS = 16 * WARPS;  // of a block at once
constexpr int GAP = 8;                    // numbers between two rows in shared memory, to keep them in different banks

typedef unsigned short bfloat16;  // its bits

__device__ constexpr int padded(int i)
{
    return (WIDTHS[i] + 15) / 16 * 16;
}

__device__ constexpr int widest()
{
    int most = 0;
    for (int i = 0; i <= LAYERS; i++)
        most = padded(i) > most ? padded(i) : most;
    return most;
}

// Whether a ReLU follows a layer.
__device__ constexpr bool activated(int layer)
{
    return layer + 1 < LAYERS || LAST_RELU;
}

// Where a layer's weights (D, C) begin among the parameters; its bias (D) lies behind them.
__device__ constexpr int parameters_at(int layer)
{
    int at = 0;
    for (int i = 0; i < layer; i++)
        at += (WIDTHS[i] + 1) * WIDTHS[i + 1];
    return at;
}

// Where its weights begin in shared memory.
__device__ constexpr int weights_at(int layer)
{
    int at = 0;
    for (int i = 0; i < layer; i++)
        at += (padded(i) + GAP) * padded(i + 1);
    return at;
}

__device__ constexpr int bias_at(int layer)
{
    int at = 0;
    for (int i = 0; i < layer; i++)
        at += padded(i + 1);
    return at;
}

// How many tiles of the gradient in a layer's weights a warp adds up: its part of them all, with one more column of
// tiles for the bias.
__device__ constexpr int tiles_per_warp(int layer)
{
    int tiles = padded(layer + 1) / 16 * (padded(layer) / 16 + 1);
    return (tiles + WARPS - 1) / WARPS;
}

__device__ constexpr int tiles_before(int layer)
{
    int count = 0;
    for (int i = 0; i < layer; i++)
        count += tiles_per_warp(i);
    return count;
}

// What shared memory holds, one behind the other.
struct Shared {
    bfloat16 weights[weights_at(LAYERS)];                     // (D, C + GAP) of every layer
    float biases[bias_at(LAYERS)];                            // (D,) of every layer
    bfloat16 inputs[BLOCK_POINTS * (widest() + GAP)];         // of one layer, (BLOCK_POINTS, C + GAP)
    bfloat16 output_grads[BLOCK_POINTS * (widest() + GAP)];   // (BLOCK_POINTS, D + GAP)
};

// All four begin at multiples of 16 bytes.
static_assert(sizeof(Shared) == SHARED, "mlp.py counts other bytes");
extern __shared__ uint4 memory[];

__device__ Shared& shared()
{
    return *(Shared*)memory;
}


// ------------------------------------------------------------------------------------------ tiles of 16 x 16 numbers

// A matrix of bfloat16 in the registers of a warp: four parts of 8 x 8, of which thread 4 i + j holds the numbers 2 j
// and 2 j + 1 of row i. The left factor of a product, and its result, have them in the order upper left, lower left,
// upper right, lower right. So has the right factor, but of each part the thread holds the numbers 2 j and 2 j + 1 of
// column i.
struct Fragment {
    unsigned part[4];
};

// The result of a product in float32: two numbers for each part.
struct Accumulator {
    float2 part[4];
};

// All channels of the 16 points of a warp: a point a row, 16 channels a fragment.
template <int WIDTH>
struct Rows {
    Fragment tile[WIDTH / 16];
};

// The same in float32.
template <int WIDTH>
struct Accumulators {
    Accumulator tile[WIDTH / 16];
};

__device__ unsigned pack(float2 pair)
{
    unsigned packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(pair.y), "f"(pair.x));
    return packed;
}

__device__ float2 unpack(unsigned packed)
{
    return make_float2(__uint_as_float(packed << 16), __uint_as_float(packed & 0xffff0000u));
}

__device__ int lane()
{
    return threadIdx.x % 32;
}

__device__ int warp()
{
    return threadIdx.x / 32;
}

// Which of the 16 rows, and the first of which two of the 16 columns, of a part are a thread's.
__device__ int row_of(int part)
{
    return part % 2 * 8 + lane() / 4;
}

__device__ int column_of(int part)
{
    return part / 2 * 8 + lane() % 4 * 2;
}

// sum += a b for 16 x 16 by 16 x 8 numbers.
__device__ void multiply_half(float2& upper, float2& lower, const Fragment& a, unsigned b_upper, unsigned b_lower)
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(upper.x), "+f"(upper.y), "+f"(lower.x), "+f"(lower.y)
                 : "r"(a.part[0]), "r"(a.part[1]), "r"(a.part[2]), "r"(a.part[3]), "r"(b_upper), "r"(b_lower));
}

// sum += a b.
__device__ void multiply(Accumulator& sum, const Fragment& a, const Fragment& b)
{
    multiply_half(sum.part[0], sum.part[1], a, b.part[0], b.part[1]);
    multiply_half(sum.part[2], sum.part[3], a, b.part[2], b.part[3]);
}

// A fragment from shared memory. Its four parts come in the order upper left, upper right, lower left, lower right, or
// by columns: upper left, lower left, upper right, lower right. Of each part a thread gets two numbers of a row, or
// TRANSPOSED of a column.
template <bool TRANSPOSED>
__device__ Fragment load(const bfloat16* corner, int stride, bool by_columns)
{
    // Each thread tells where a row of eight numbers begins.
    int part = lane() / 8;
    int below = by_columns ? part % 2 : part / 2;
    int right = by_columns ? part / 2 : part % 2;
    const bfloat16* row = corner + (8 * below + lane() % 8) * stride + 8 * right;
    unsigned address = __cvta_generic_to_shared(row);

    Fragment tile;
    if (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(tile.part[0]), "=r"(tile.part[1]), "=r"(tile.part[2]), "=r"(tile.part[3])
                     : "r"(address) : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(tile.part[0]), "=r"(tile.part[1]), "=r"(tile.part[2]), "=r"(tile.part[3])
                     : "r"(address) : "memory");
    return tile;
}


// ------------------------------------------------------------------------------------------ rows of 16 points

// Rows `first` to `first` + 15 of a matrix (N, WIDTH) in float32; beyond it zeros.
template <int WIDTH, int PADDED>
__device__ Rows<PADDED> read_rows(const float* matrix, int first, int points)
{
    Rows<PADDED> rows;
    for (int i = 0; i < PADDED / 16; i++)
        for (int part = 0; part < 4; part++) {
            int point = first + row_of(part);
            int channel = 16 * i + column_of(part);
            const float* at = matrix + (long long)point * WIDTH + channel;
            float2 pair = make_float2(0, 0);
            if (point < points && WIDTH % 2 == 0 && channel < WIDTH)
                pair = *(const float2*)at;
            if (point < points && WIDTH % 2 == 1) {
                pair.x = channel < WIDTH ? at[0] : 0;
                pair.y = channel + 1 < WIDTH ? at[1] : 0;
            }
            rows.tile[i].part[part] = pack(pair);
        }
    return rows;
}

// The reverse, in float32.
template <int WIDTH, int PADDED>
__device__ void write_rows(const Accumulators<PADDED>& rows, float* matrix, int first, int points)
{
    for (int i = 0; i < PADDED / 16; i++)
        for (int part = 0; part < 4; part++) {
            int point = first + row_of(part);
            int channel = 16 * i + column_of(part);
            float* at = matrix + (long long)point * WIDTH + channel;
            float2 pair = rows.tile[i].part[part];
            if (point < points && WIDTH % 2 == 0 && channel < WIDTH)
                *(float2*)at = pair;
            if (point < points && WIDTH % 2 == 1) {
                if (channel < WIDTH)
                    at[0] = pair.x;
                if (channel + 1 < WIDTH)
                    at[1] = pair.y;
            }
        }
}

template <int PADDED>
__device__ Rows<PADDED> rounded(const Accumulators<PADDED>& exact)
{
    Rows<PADDED> rows;
    for (int i = 0; i < PADDED / 16; i++)
        for (int part = 0; part < 4; part++)
            rows.tile[i].part[part] = pack(exact.tile[i].part[part]);
    return rows;
}

// This warp's rows into shared memory, (BLOCK_POINTS, PADDED + GAP).
template <int PADDED>
__device__ void store_rows(const Rows<PADDED>& rows, bfloat16* matrix)
{
    for (int i = 0; i < PADDED / 16; i++)
        for (int part = 0; part < 4; part++) {
            int point = 16 * warp() + row_of(part);
            int channel = 16 * i + column_of(part);
            *(unsigned*)(matrix + point * (PADDED + GAP) + channel) = rows.tile[i].part[part];
        }
}

// The parameters (P) of the layers from L on into shared memory, the weights rounded.
template <int L>
__device__ void read_parameters(const float* parameters)
{
    constexpr int C = WIDTHS[L], D = WIDTHS[L + 1];
    const float* layer = parameters + parameters_at(L);
    for (int i = threadIdx.x; i < padded(L + 1) * padded(L); i += blockDim.x) {
        int row = i / padded(L);
        int column = i % padded(L);
        float weight = row < D && column < C ? layer[row * C + column] : 0;
        shared().weights[weights_at(L) + row * (padded(L) + GAP) + column] = pack(make_float2(weight, 0));
    }
    for (int i = threadIdx.x; i < padded(L + 1); i += blockDim.x)
        shared().biases[bias_at(L) + i] = i < D ? layer[D * C + i] : 0;
    if constexpr (L + 1 < LAYERS)
        read_parameters<L + 1>(parameters);
}


// ------------------------------------------------------------------------------------------ the network

// x W^T + b, then ReLU if one follows. What is not a number stays what it is.
template <int L>
__device__ Accumulators<padded(L + 1)> apply_layer(const Rows<padded(L)>& x)
{
    constexpr int STRIDE = padded(L) + GAP;
    Accumulators<padded(L + 1)> y;
    for (int i = 0; i < padded(L + 1) / 16; i++) {
        for (int part = 0; part < 4; part++)
            y.tile[i].part[part] = *(const float2*)(shared().biases + bias_at(L) + 16 * i + column_of(part));

        // The right factor is W^T, whose columns are the rows of W.
        const bfloat16* rows = shared().weights + weights_at(L) + 16 * i * STRIDE;
        for (int j = 0; j < padded(L) / 16; j++)
            multiply(y.tile[i], x.tile[j], load<false>(rows + 16 * j, STRIDE, false));

        if (activated(L))
            for (int part = 0; part < 4; part++) {
                float2 pair = y.tile[i].part[part];
                y.tile[i].part[part] = make_float2(pair.x < 0 ? 0 : pair.x, pair.y < 0 ? 0 : pair.y);
            }
    }
    return y;
}

// What the layers from L on make of x.
template <int L>
__device__ Accumulators<padded(LAYERS)> apply_layers(const Rows<padded(L)>& x)
{
    if constexpr (L + 1 == LAYERS)
        return apply_layer<L>(x);
    else
        return apply_layers<L + 1>(rounded(apply_layer<L>(x)));
}

// x (N, C of the first layer) -> y (N, D of the last one).
extern "C" __global__ void network_forward(const float* x, const float* parameters, float* y, int points)
{
    read_parameters<0>(parameters);
    __syncthreads();
    for (int first = (blockIdx.x * WARPS + warp()) * 16; first < points; first += gridDim.x * BLOCK_POINTS) {
        Rows<padded(0)> rows = read_rows<WIDTHS[0], padded(0)>(x, first, points);
        write_rows<WIDTHS[LAYERS], padded(LAYERS)>(apply_layers<0>(rows), y, first, points);
    }
}


// ------------------------------------------------------------------------------------------ its gradient

// The gradient before a ReLU from the one behind it, where its result is y.
template <int PADDED>
__device__ Rows<PADDED> relu_backward(Rows<PADDED> grad, const Rows<PADDED>& y)
{
    for (int i = 0; i < PADDED / 16; i++)
        for (int part = 0; part < 4; part++) {
            float2 value = unpack(y.tile[i].part[part]);
            unsigned kept = (value.x <= 0 ? 0 : 0xffffu) | (value.y <= 0 ? 0 : 0xffff0000u);
            grad.tile[i].part[part] &= kept;
        }
    return grad;
}

// The gradient in a layer's x, from that in its x W^T + b: its product with W, the right factor.
template <int L>
__device__ Accumulators<padded(L)> input_gradient(const Rows<padded(L + 1)>& grad)
{
    constexpr int STRIDE = padded(L) + GAP;
    Accumulators<padded(L)> x_grad = {};
    for (int i = 0; i < padded(L) / 16; i++) {
        const bfloat16* columns = shared().weights + weights_at(L) + 16 * i;
        for (int j = 0; j < padded(L + 1) / 16; j++)
            multiply(x_grad.tile[i], grad.tile[j], load<true>(columns + 16 * j * STRIDE, STRIDE, true));
    }
    return x_grad;
}

// Add the gradient in a layer's weights and bias, over the points of the block: grad^T x, and grad^T times ones. Each
// warp has some tiles of it. Both factors pass through shared memory, which hands grad out transposed.
template <int L>
__device__ void add_weight_gradient(const Rows<padded(L)>& x, const Rows<padded(L + 1)>& grad, Accumulator* sums)
{
    __syncthreads();
    store_rows(x, shared().inputs);
    store_rows(grad, shared().output_grads);
    __syncthreads();

    constexpr int ROWS = padded(L + 1) / 16, COLUMNS = padded(L) / 16 + 1;
    constexpr int STRIDE = padded(L) + GAP, GRAD_STRIDE = padded(L + 1) + GAP;
    const unsigned ones = 0x3f803f80u;  // 1 in bfloat16, twice
    for (int i = 0; i < tiles_per_warp(L); i++) {
        int tile = i * WARPS + warp();
        int row = tile / COLUMNS;
        int column = tile % COLUMNS;
        if (row >= ROWS)
            continue;
        for (int j = 0; j < WARPS; j++) {
            const bfloat16* grads = shared().output_grads + 16 * j * GRAD_STRIDE + 16 * row;
            const bfloat16* inputs = shared().inputs + 16 * j * STRIDE + 16 * column;
            Fragment right = {ones, ones, ones, ones};
            if (column + 1 < COLUMNS)
                right = load<true>(inputs, STRIDE, true);
            multiply(sums[tiles_before(L) + i], load<true>(grads, GRAD_STRIDE, false), right);
        }
    }
}

// The gradient in x W^T + b of layer L, from that in the last layer's result; adds those in the parameters from this
// layer on.
template <int L>
__device__ Rows<padded(L + 1)> backward_from(const Rows<padded(L)>& x, const Rows<padded(LAYERS)>& last_grad,
                                             Accumulator* sums)
{
    Rows<padded(L + 1)> grad;
    if constexpr (L + 1 == LAYERS && !activated(L))
        grad = last_grad;
    else {
        Rows<padded(L + 1)> y = rounded(apply_layer<L>(x));
        if constexpr (L + 1 == LAYERS)
            grad = last_grad;
        else
            grad = rounded(input_gradient<L + 1>(backward_from<L + 1>(y, last_grad, sums)));
        grad = relu_backward(grad, y);
    }
    add_weight_gradient<L>(x, grad, sums);
    return grad;
}

// A block's sums for the layers from L on into its row of the gradients in all parameters.
template <int L>
__device__ void write_sums(const Accumulator* sums, float* parameters_grad)
{
    constexpr int C = WIDTHS[L], D = WIDTHS[L + 1], COLUMNS = padded(L) / 16 + 1;
    float* layer = parameters_grad + parameters_at(L);
    for (int i = 0; i < tiles_per_warp(L); i++) {
        int tile = i * WARPS + warp();
        for (int part = 0; part < 4; part++) {
            int row = tile / COLUMNS * 16 + row_of(part);
            int column = tile % COLUMNS * 16 + column_of(part);
            float2 pair = sums[tiles_before(L) + i].part[part];
            if (row < D && column < C)
                layer[row * C + column] = pair.x;
            if (row < D && column + 1 < C)
                layer[row * C + column + 1] = pair.y;
            if (row < D && column == padded(L))
                layer[D * C + row] = pair.x;
        }
    }
    if constexpr (L + 1 < LAYERS)
        write_sums<L + 1>(sums, parameters_grad);
}

// The gradient in y -> in x and in the parameters: parameters_grad (blocks, P), of which the sum is wanted.
extern "C" __global__ void network_backward(const float* x, const float* parameters, const float* y_grad, float* x_grad,
                                            float* parameters_grad, int points)
{
    read_parameters<0>(parameters);
    __syncthreads();
    Accumulator sums[tiles_before(LAYERS)] = {};

    // All warps of a block take part in every sum, those beyond the last point with gradients of zero.
    for (int base = blockIdx.x * BLOCK_POINTS; base < points; base += gridDim.x * BLOCK_POINTS) {
        int first = base + 16 * warp();
        Rows<padded(0)> rows = read_rows<WIDTHS[0], padded(0)>(x, first, points);
        Rows<padded(LAYERS)> last_grad = read_rows<WIDTHS[LAYERS], padded(LAYERS)>(y_grad, first, points);
        Rows<padded(1)> grad = backward_from<0>(rows, last_grad, sums);
        write_rows<WIDTHS[0], padded(0)>(input_gradient<0>(grad), x_grad, first, points);
    }
    write_sums<0>(sums, parameters_grad + (long long)blockIdx.x * parameters_at(LAYERS));
}
