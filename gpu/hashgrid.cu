// The multi-resolution hash encoding and its gradient (Instant NGP, Mueller et al. 2022, Sec. 3) as CUDA kernels.
//
// `hashgrid.py` compiles this file at run time; its plain torch is the same arithmetic and the reference for this one.
//
// A thread is a point in a level, or in the gradient several points. A block is a few levels wide, so that the features
// that its threads write lie side by side and fill whole sectors of 32 bytes, the unit in which memory is moved. The
// grid of blocks is done with all points in these levels before it comes to finer ones, so that only a few levels' rows
// compete for the cache.
//
// What bounds it are the rows: for every point and level eight reads, or additions, at places without an order. Hence
// the care below to have few of them, and none for the index arithmetic.
//
// Shapes: N points, L levels, C features per level, T rows of a level. The compiler's options define CHANNELS, which is
// C (1, 2, 4 or 8), THREADS of a block, and RUN, the points of a thread in the gradient.

// The features of one corner. The alignment lets a thread move them by one instruction for every 16 bytes.
struct alignas(CHANNELS < 4 ? 4 * CHANNELS : 16) Row {
    float feature[CHANNELS];
};

// One of the grids, `Level` of `hashgrid.py`.
struct Level {
    float scale;
    unsigned stride[3];
    unsigned rows;        // T
    unsigned reciprocal;  // (2^32 - 1) / T, rounded down
    bool hashed;
    int corners;          // of a cell: 8, or 4 where the index leaves out z, as a tiled one may
};

// The cell of a level around a point. Along each axis it has two sides: a lower one, 0, and an upper one, 1.
struct Cell {
    unsigned lower[3];   // what the lower side contributes to the index of its corners; the upper adds the stride
    float weight[3][2];  // factor of a side in the trilinear interpolation
};


// ------------------------------------------------------------------------------------------ one cell, one corner

__device__ Level load_level(const float* scale, const unsigned* stride, const unsigned* rows, int hashed_from,
                            int index)
{
    Level level;
    level.scale = scale[index];
    for (int axis = 0; axis < 3; axis++)
        level.stride[axis] = stride[3 * index + axis];
    level.rows = rows[index];
    level.reciprocal = 0xffffffffu / level.rows;
    level.hashed = index >= hashed_from;
    level.corners = level.stride[2] ? 8 : 4;
    return level;
}

// Find the cell around a point x (3) of the unit cube. False outside of it, where there are no features.
__device__ bool find_cell(const Level& level, const float* x, Cell& cell)
{
    bool outside = false;
    for (int axis = 0; axis < 3; axis++) {
        outside |= x[axis] < 0 || x[axis] > 1;

        // Scale the point by the grid's resolution. Two roundings, as in torch, where a fused operation has one.
        float position = __fadd_rn(__fmul_rn(x[axis], level.scale), 0.5f);
        float lower = floorf(position);
        cell.weight[axis][1] = position - lower;
        cell.weight[axis][0] = 1 - cell.weight[axis][1];

        // Products wrap around at 2^32, which is part of the hash.
        cell.lower[axis] = (unsigned)(int)lower * level.stride[axis];
    }

    // Where the index leaves out z, both sides of z are one row, whose two weights add up to 1.
    if (level.corners == 4)
        cell.weight[2][0] = 1;
    return !outside;
}

// The row of a corner. Its bits 0, 1 and 2 are the sides of x, y and z, so that neighbors along x follow one another.
__device__ unsigned row_of(const Level& level, const Cell& cell, int corner)
{
    unsigned x = cell.lower[0] + (corner & 1 ? level.stride[0] : 0);
    unsigned y = cell.lower[1] + (corner & 2 ? level.stride[1] : 0);
    unsigned z = cell.lower[2] + (corner & 4 ? level.stride[2] : 0);

    // A fine level hashes the corner (Instant NGP, Eq. 4); a coarse one counts corners row by row.
    unsigned index = level.hashed ? x ^ y ^ z : x + y + z;

    // The index modulo T without a division: the quotient is exact or one too small. In the latter case the difference
    // is at least T; in the former, subtracting T once more wraps around to a large number.
    unsigned rest = index - __umulhi(index, level.reciprocal) * level.rows;
    return min(rest, rest - level.rows);
}

// The weight of a corner in the interpolation.
__device__ float weight_of(const Cell& cell, int corner)
{
    return cell.weight[0][corner & 1] * cell.weight[1][corner >> 1 & 1] * cell.weight[2][corner >> 2];
}


// ------------------------------------------------------------------------------------------ forward

// x (N, 3), table (T of all levels, C) -> features (N, L, C).
//
// The bounds leave the compiler registers for several rows, or it would wait for one before it loads the next.
extern "C" __global__ void __launch_bounds__(THREADS, 1024 / THREADS)
encode_forward(const float* __restrict__ x, const Row* __restrict__ table, const float* __restrict__ scale,
               const unsigned* __restrict__ stride, const unsigned* __restrict__ rows,
               const unsigned* __restrict__ offset, int hashed_from, int points, int levels,
               Row* __restrict__ features)
{
    // Which point, and which level?
    unsigned point = blockIdx.x * blockDim.y + threadIdx.y;
    int index = blockIdx.y * blockDim.x + threadIdx.x;
    if (point >= points || index >= levels)
        return;
    Level level = load_level(scale, stride, rows, hashed_from, index);

    // Interpolate the rows of the corners; outside the cube the features are 0.
    Row sum = {};
    Cell cell;
    if (find_cell(level, x + 3ull * point, cell)) {
        const Row* corner_rows = table + offset[index];
        #pragma unroll
        for (int corner = 0; corner < 8; corner++) {
            if (corner == level.corners)
                break;
            Row row = corner_rows[row_of(level, cell, corner)];
            float weight = weight_of(cell, corner);
            for (int channel = 0; channel < CHANNELS; channel++)
                sum.feature[channel] += weight * row.feature[channel];
        }
    }
    features[(unsigned long long)point * levels + index] = sum;
}


// ------------------------------------------------------------------------------------------ backward

// Add COUNT numbers to as many in memory, side by side: by as few atomic operations as the GPU has.
template <int COUNT> __device__ void add(Row* destination, const float* numbers)
{
    float* to = destination->feature;
#if __CUDA_ARCH__ >= 900
    if constexpr (COUNT == 2)
        atomicAdd((float2*)to, make_float2(numbers[0], numbers[1]));
    else if constexpr (COUNT % 4 == 0)
        for (int i = 0; i < COUNT; i += 4)
            atomicAdd((float4*)(to + i), make_float4(numbers[i], numbers[i + 1], numbers[i + 2], numbers[i + 3]));
    else
#endif
    for (int i = 0; i < COUNT; i++)
        atomicAdd(to + i, numbers[i]);
}

// Add the shares of a cell's corners to the gradients of their rows, two neighbors along x at a time.
__device__ void add_shares(const Level& level, const Cell& cell, const Row* shares, Row* corner_grads)
{
    #pragma unroll
    for (int corner = 0; corner < 8; corner += 2) {
        if (corner == level.corners)
            break;
        unsigned lower = row_of(level, cell, corner);
        unsigned upper = row_of(level, cell, corner + 1);

        // Half of all neighbors are an even row and the odd one behind it: narrow ones are one addition of 16 bytes.
        if (CHANNELS <= 2 && (lower ^ upper) == 1) {
            float both[2 * CHANNELS];
            for (int channel = 0; channel < CHANNELS; channel++) {
                float lower_share = shares[corner].feature[channel];
                float upper_share = shares[corner + 1].feature[channel];
                both[channel] = lower < upper ? lower_share : upper_share;
                both[CHANNELS + channel] = lower < upper ? upper_share : lower_share;
            }
            add<2 * CHANNELS>(corner_grads + min(lower, upper), both);
        } else {
            add<CHANNELS>(corner_grads + lower, shares[corner].feature);
            add<CHANNELS>(corner_grads + upper, shares[corner + 1].feature);
        }
    }
}

// x (N, 3), gradient of the features (N, L, C) -> added to the gradient of the table (T of all levels, C).
//
// A thread follows a run of points. As long as they stay in one cell, as the samples of a ray do in coarse levels, it
// sums up the shares of the corners itself: many additions to few rows would wait for one another.
extern "C" __global__ void __launch_bounds__(THREADS)
encode_backward(const float* __restrict__ x, Row* __restrict__ table_grad, const float* __restrict__ scale,
                const unsigned* __restrict__ stride, const unsigned* __restrict__ rows,
                const unsigned* __restrict__ offset, int hashed_from, int points, int levels,
                const Row* __restrict__ feature_grad)
{
    // Which points, and which level?
    unsigned first = (blockIdx.x * blockDim.y + threadIdx.y) * RUN;
    int index = blockIdx.y * blockDim.x + threadIdx.x;
    if (index >= levels)
        return;
    Level level = load_level(scale, stride, rows, hashed_from, index);
    Row* corner_grads = table_grad + offset[index];

    Row shares[8];
    Cell cell = {};
    bool begun = false;
    for (unsigned point = first; point < first + RUN && point < points; point++) {
        // A hidden sample has no gradient and changes nothing.
        Row grad = feature_grad[(unsigned long long)point * levels + index];
        bool zero = true;
        for (int channel = 0; channel < CHANNELS; channel++)
            zero &= grad.feature[channel] == 0;
        if (zero)
            continue;

        Cell next;
        if (!find_cell(level, x + 3ull * point, next))
            continue;

        // The point is in another cell: be done with the last one.
        bool same = begun;
        for (int axis = 0; axis < 3; axis++)
            same &= next.lower[axis] == cell.lower[axis];
        if (begun && !same)
            add_shares(level, cell, shares, corner_grads);

        // Each corner gets its share of the gradient.
        #pragma unroll
        for (int corner = 0; corner < 8; corner++) {
            float weight = weight_of(next, corner);
            for (int channel = 0; channel < CHANNELS; channel++) {
                float before = same ? shares[corner].feature[channel] : 0;
                shares[corner].feature[channel] = before + weight * grad.feature[channel];
            }
        }
        cell = next;
        begun = true;
    }
    if (begun)
        add_shares(level, cell, shares, corner_grads);
}
