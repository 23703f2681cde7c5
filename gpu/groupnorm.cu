// Group normalization (Wu and He 2018), a modulation and SiLU in one pass, and their gradients; the sum of a residual
// block: CUDA kernels.
//
// `groupnorm.py` compiles this file at run time; its plain torch is the same arithmetic and the reference for this one.
//
// Maps are in half precision with their channels last in memory, as convolutions on tensor cores want them: (B, P, C).
// With BFLOAT, as in training, they are in bfloat16, and all that belongs to channels, not pixels, is in float32.
// torch's own kernel would reorder the map before and after. A block is a chunk of the pixels of one image. Its threads
// are columns of VECTOR neighboring channels, which lie in one group, times rows of pixels.
//
// A first kernel sums over every chunk, a second one adds up the chunks and writes. Sums are in float32 and always in
// the same order, so that results repeat bit by bit.
//
// A map may still lack the bias of the convolution that made it: then `offset` (C) is added whenever it is read.
// Pointers to what there is not are null.
//
// Shapes: B images, P pixels, C channels, G groups, K chunks per image.

struct alignas(2 * VECTOR) Pack {
    unsigned short value[VECTOR];
};

#if BFLOAT
typedef float Number;  // of a channel
#define FROM_FLOAT "cvt.rn.bf16.f32 %0, %1;"
#else
typedef unsigned short Number;
#define FROM_FLOAT "cvt.rn.f16.f32 %0, %1;"
#endif

// VECTOR of them.
struct Row {
    Number value[VECTOR];
};

__device__ float to_float(float x)
{
    return x;
}

__device__ float to_float(unsigned short bits)
{
#if BFLOAT
    return __uint_as_float((unsigned int)bits << 16);
#else
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
#endif
}

__device__ unsigned short from_float(float x)
{
    unsigned short bits;
    asm(FROM_FLOAT : "=h"(bits) : "f"(x));
    return bits;
}

__device__ float sigmoid(float x)
{
    return 1.0f / (1.0f + __expf(-x));
}

// What a thread works on.
struct Place {
    int column;      // the first of its channels is VECTOR * column
    int columns;     // of all channels
    int first;       // of its pixels; then every blockDim.y-th
    int end;         // of the pixels of the block
    long long base;  // of the image, in Packs
};

__device__ Place find_place(int pixels)
{
    Place place;
    int chunk = (pixels + gridDim.x - 1) / gridDim.x;
    place.columns = blockDim.x;
    place.column = threadIdx.x;
    place.first = blockIdx.x * chunk + threadIdx.y;
    place.end = min(pixels, (int)(blockIdx.x + 1) * chunk);
    place.base = (long long)blockIdx.y * pixels * blockDim.x;
    return place;
}

// Add two numbers of all threads, group by group, and write the sums (B, K, G, 2) of the block.
__device__ void write_sums(float2 mine, float2* shared, float* sums, int groups)
{
    int thread = threadIdx.y * blockDim.x + threadIdx.x;
    shared[thread] = mine;
    __syncthreads();
    if (thread >= groups)
        return;

    // A group is some neighboring columns of all rows.
    int width = blockDim.x / groups;
    float2 total = make_float2(0, 0);
    for (int row = 0; row < blockDim.y; row++)
        for (int i = 0; i < width; i++) {
            float2 part = shared[row * blockDim.x + thread * width + i];
            total.x += part.x;
            total.y += part.y;
        }
    long long at = ((long long)blockIdx.y * gridDim.x + blockIdx.x) * groups + thread;
    sums[2 * at] = total.x;
    sums[2 * at + 1] = total.y;
}

// The sums of all chunks (B, K, G, 2) divided by the numbers in a group, for the group of this thread.
__device__ float2 read_means(const float* sums, float2* shared, int chunks, int groups, float count)
{
    // Each thread adds some chunks of one group.
    int thread = threadIdx.y * blockDim.x + threadIdx.x;
    int lanes = blockDim.x * blockDim.y / groups;
    int group = thread % groups;
    int lane = thread / groups;
    float2 total = make_float2(0, 0);
    for (int chunk = lane; chunk < chunks && lane < lanes; chunk += lanes) {
        long long at = ((long long)blockIdx.y * chunks + chunk) * groups + group;
        total.x += sums[2 * at];
        total.y += sums[2 * at + 1];
    }
    __syncthreads();
    shared[thread] = total;
    __syncthreads();

    // Then all lanes of its own group.
    group = threadIdx.x / (blockDim.x / groups);
    total = make_float2(0, 0);
    for (int i = 0; i < lanes && i < chunks; i++) {
        total.x += shared[i * groups + group].x;
        total.y += shared[i * groups + group].y;
    }
    return make_float2(total.x / count, total.y / count);
}

// VECTOR numbers of a row, or zeros where there is none.
__device__ void read_row(const Row* row, int column, float* values)
{
    for (int i = 0; i < VECTOR; i++)
        values[i] = row ? to_float(row[column].value[i]) : 0.0f;
}

// What is known of a thread's channels before their pixels are read.
struct Layer {
    float count;           // of the numbers in a group
    float center[VECTOR];  // the mean, less what is still to be added to x
    float inverse_std;
    float gain[VECTOR];    // times the modulation's factor, if there is one
    float bias[VECTOR];    // the same, and its summand
};

// A modulation (B, 2 C) is by 1 + its first half, and the other half is added.
__device__ Layer find_layer(const Place& place, const float* sums, float2* shared, const Row* offset, const Row* gain,
                            const Row* bias, const Row* modulation, int pixels, int groups, int chunks, double eps)
{
    Layer layer;
    layer.count = (float)pixels * VECTOR * (place.columns / groups);
    float2 means = read_means(sums, shared, chunks, groups, layer.count);
    layer.inverse_std = rsqrtf(fmaxf(means.y - means.x * means.x, 0.0f) + (float)eps);

    read_row(gain, place.column, layer.gain);
    read_row(bias, place.column, layer.bias);
    read_row(offset, place.column, layer.center);
    for (int i = 0; i < VECTOR; i++)
        layer.center[i] = means.x - layer.center[i];

    if (modulation) {
        float scale[VECTOR], shift[VECTOR];
        const Row* row = modulation + (long long)blockIdx.y * 2 * place.columns;
        read_row(row, place.column, scale);
        read_row(row, place.columns + place.column, shift);
        for (int i = 0; i < VECTOR; i++) {
            layer.gain[i] *= 1.0f + scale[i];
            layer.bias[i] = layer.bias[i] * (1.0f + scale[i]) + shift[i];
        }
    }
    return layer;
}


// ------------------------------------------------------------------------------------------ the normalization

// Sum x and x^2 over chunks: sums (B, K, G, 2).
extern "C" __global__ void moments(const Pack* x, const Row* offset, float* sums, int pixels, int groups)
{
    extern __shared__ float2 shared[];
    Place place = find_place(pixels);
    float offsets[VECTOR];
    read_row(offset, place.column, offsets);

    float2 sum = make_float2(0, 0);
    for (int pixel = place.first; pixel < place.end; pixel += blockDim.y) {
        Pack pack = x[place.base + (long long)pixel * place.columns + place.column];
        for (int i = 0; i < VECTOR; i++) {
            float value = to_float(pack.value[i]) + offsets[i];
            sum.x += value;
            sum.y += value * value;
        }
    }
    write_sums(sum, shared, sums, groups);
}

// y = act(normalized x * gain + bias).
extern "C" __global__ void apply(const Pack* x, const Row* offset, const float* sums, const Row* gain, const Row* bias,
                                 const Row* modulation, Pack* y, int silu, int pixels, int groups, int chunks,
                                 double eps)
{
    extern __shared__ float2 shared[];
    Place place = find_place(pixels);
    Layer layer = find_layer(place, sums, shared, offset, gain, bias, modulation, pixels, groups, chunks, eps);

    // All that happens to a channel is one factor and one summand.
    float factor[VECTOR], summand[VECTOR];
    for (int i = 0; i < VECTOR; i++) {
        factor[i] = layer.inverse_std * layer.gain[i];
        summand[i] = layer.bias[i] - layer.center[i] * factor[i];
    }

    for (int pixel = place.first; pixel < place.end; pixel += blockDim.y) {
        long long at = place.base + (long long)pixel * place.columns + place.column;
        Pack pack = x[at];
        for (int i = 0; i < VECTOR; i++) {
            float value = to_float(pack.value[i]) * factor[i] + summand[i];
            pack.value[i] = from_float(silu ? value * sigmoid(value) : value);
        }
        y[at] = pack;
    }
}


// ------------------------------------------------------------------------------------------ its gradients

// The normalized x of a channel, and the gradient in gain * it + bias from the gradient in y.
__device__ float2 normalized_and_gradient(const Layer& layer, int i, unsigned short x, unsigned short grad, int silu)
{
    float normalized = (to_float(x) - layer.center[i]) * layer.inverse_std;
    float slope = 1.0f;
    if (silu) {
        float value = normalized * layer.gain[i] + layer.bias[i];
        float s = sigmoid(value);
        slope = s * (1.0f + value * (1.0f - s));
    }
    return make_float2(normalized, to_float(grad) * slope);
}

// Sum that gradient, and its product with the normalized x, over chunks: of channels (B, K, C, 2), if they are wanted;
// and times their gain, which is the gradient in the normalized x, of groups (B, K, G, 2).
extern "C" __global__ void gradient_moments(const Pack* x, const Row* offset, const float* sums, const Row* gain,
                                            const Row* bias, const Row* modulation, const Pack* grad,
                                            float2* channel_sums, float* grad_sums, int silu, int pixels, int groups,
                                            int chunks, double eps)
{
    extern __shared__ float2 shared[];
    Place place = find_place(pixels);
    Layer layer = find_layer(place, sums, shared, offset, gain, bias, modulation, pixels, groups, chunks, eps);

    float2 channel[VECTOR] = {};
    for (int pixel = place.first; pixel < place.end; pixel += blockDim.y) {
        long long at = place.base + (long long)pixel * place.columns + place.column;
        Pack pack = x[at];
        Pack grads = grad[at];
        for (int i = 0; i < VECTOR; i++) {
            float2 both = normalized_and_gradient(layer, i, pack.value[i], grads.value[i], silu);
            channel[i].x += both.y;
            channel[i].y += both.y * both.x;
        }
    }

    // The channels of a column, one after the other, over all rows.
    float2* row = channel_sums + ((long long)blockIdx.y * gridDim.x + blockIdx.x) * place.columns * VECTOR;
    float2 sum = make_float2(0, 0);
    for (int i = 0; i < VECTOR; i++) {
        sum.x += channel[i].x * layer.gain[i];
        sum.y += channel[i].y * layer.gain[i];
        if (!channel_sums)
            continue;
        __syncthreads();
        shared[threadIdx.y * blockDim.x + threadIdx.x] = channel[i];
        __syncthreads();
        for (int other = 1; other < blockDim.y && threadIdx.y == 0; other++) {
            channel[i].x += shared[other * blockDim.x + threadIdx.x].x;
            channel[i].y += shared[other * blockDim.x + threadIdx.x].y;
        }
        if (threadIdx.y == 0)
            row[place.column * VECTOR + i] = channel[i];
    }
    __syncthreads();
    write_sums(sum, shared, grad_sums, groups);
}

// The gradient in x: that in the normalized x, less its mean and its share along it, over the standard deviation.
extern "C" __global__ void gradient_apply(const Pack* x, const Row* offset, const float* sums, const Row* gain,
                                          const Row* bias, const Row* modulation, const Pack* grad,
                                          const float* grad_sums, Pack* grad_x, int silu, int pixels, int groups,
                                          int chunks, double eps)
{
    extern __shared__ float2 shared[];
    Place place = find_place(pixels);
    Layer layer = find_layer(place, sums, shared, offset, gain, bias, modulation, pixels, groups, chunks, eps);
    float2 means = read_means(grad_sums, shared, chunks, groups, layer.count);

    for (int pixel = place.first; pixel < place.end; pixel += blockDim.y) {
        long long at = place.base + (long long)pixel * place.columns + place.column;
        Pack grads = grad[at];
        Pack out = x[at];
        for (int i = 0; i < VECTOR; i++) {
            float2 both = normalized_and_gradient(layer, i, out.value[i], grads.value[i], silu);
            float slope = both.y * layer.gain[i];
            out.value[i] = from_float(layer.inverse_std * (slope - means.x - both.x * means.y));
        }
        grad_x[at] = out;
    }
}


// ------------------------------------------------------------------------------------------ a residual block's sum

// y = a + b * gate (B, C), where either map may still lack its offset.
extern "C" __global__ void add(const Pack* a, const Row* a_offset, const Pack* b, const Row* b_offset,
                               const Row* gate, Pack* y, int pixels)
{
    // What every pixel gets.
    Place place = find_place(pixels);
    float summand[VECTOR], b_offsets[VECTOR], factor[VECTOR];
    read_row(a_offset, place.column, summand);
    read_row(b_offset, place.column, b_offsets);
    read_row(gate, blockIdx.y * place.columns + place.column, factor);
    for (int i = 0; i < VECTOR; i++) {
        factor[i] = gate ? factor[i] : 1.0f;
        summand[i] += b_offsets[i] * factor[i];
    }

    for (int pixel = place.first; pixel < place.end; pixel += blockDim.y) {
        long long at = place.base + (long long)pixel * place.columns + place.column;
        Pack sum = a[at];
        Pack other = b[at];
        for (int i = 0; i < VECTOR; i++)
            sum.value[i] = from_float(to_float(sum.value[i]) + to_float(other.value[i]) * factor[i] + summand[i]);
        y[at] = sum;
    }
}
