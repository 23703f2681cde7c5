// Layer normalization (Ba et al. 2016) of short tokens in bfloat16, and its gradient: CUDA kernels.
//
// `layernorm.py` compiles this file at run time; its plain torch is the reference for this one. torch's own kernel has
// a block of 128 threads for every token, of which 24 find something to read where a token has 96 numbers; here it is
// a warp that goes from token to token, and a lane has every 32nd number. Sums are in float32 and in the same order.
//
// Shapes: R tokens of NUMBERS, a multiple of 32; W warps in the whole grid.

const int COUNT = NUMBERS / 32;  // numbers of a lane

__device__ float to_float(unsigned short bits)
{
    return __uint_as_float((unsigned int)bits << 16);
}

__device__ unsigned short to_bfloat(float x)
{
    unsigned short bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}

// Over all numbers of a token, of which each lane has added up its own.
__device__ float mean_of(float x)
{
    for (int other = 16; other > 0; other /= 2)
        x += __shfl_xor_sync(0xffffffffu, x, other);
    return x / NUMBERS;
}

// x, y (R, NUMBERS); weight, bias (NUMBERS); moments (R): mean and inverse deviation.
extern "C" __global__ void norm_forward(const unsigned short* x, const float* weight, const float* bias,
                                        unsigned short* y, float2* moments, int tokens, double eps)
{
    int lane = threadIdx.x;
    for (int token = blockIdx.x * blockDim.y + threadIdx.y; token < tokens; token += gridDim.x * blockDim.y) {
        long long first = (long long)token * NUMBERS + lane;
        float value[COUNT];
        float sum = 0;
        for (int i = 0; i < COUNT; i++) {
            value[i] = to_float(x[first + 32 * i]);
            sum += value[i];
        }

        // The squares after the mean, or they would lose their last digits.
        float mean = mean_of(sum);
        float squares = 0;
        for (int i = 0; i < COUNT; i++)
            squares += (value[i] - mean) * (value[i] - mean);
        float scale = rsqrtf(mean_of(squares) + (float)eps);

        for (int i = 0; i < COUNT; i++)
            y[first + 32 * i] = to_bfloat((value[i] - mean) * scale * weight[lane + 32 * i] + bias[lane + 32 * i]);
        moments[token] = make_float2(mean, scale);
    }
}

// Of the gradient in y (R, NUMBERS) that in x; sums (W, 2, NUMBERS): what every warp adds to those in weight and bias.
extern "C" __global__ void norm_backward(const unsigned short* x, const float* weight, const float2* moments,
                                         const unsigned short* grad, unsigned short* grad_x, float* sums, int tokens)
{
    int lane = threadIdx.x;
    int warp = blockIdx.x * blockDim.y + threadIdx.y;
    float weight_sum[COUNT] = {};
    float bias_sum[COUNT] = {};
    for (int token = warp; token < tokens; token += gridDim.x * blockDim.y) {
        long long first = (long long)token * NUMBERS + lane;
        float2 moment = moments[token];
        float normal[COUNT];
        float slope[COUNT];
        float sum = 0;
        float product = 0;
        for (int i = 0; i < COUNT; i++) {
            float g = to_float(grad[first + 32 * i]);
            normal[i] = (to_float(x[first + 32 * i]) - moment.x) * moment.y;
            slope[i] = g * weight[lane + 32 * i];
            weight_sum[i] += g * normal[i];
            bias_sum[i] += g;
            sum += slope[i];
            product += slope[i] * normal[i];
        }

        // Without what changes the mean or the deviation.
        float mean = mean_of(sum);
        float along = mean_of(product);
        for (int i = 0; i < COUNT; i++)
            grad_x[first + 32 * i] = to_bfloat(moment.y * (slope[i] - mean - along * normal[i]));
    }

    for (int i = 0; i < COUNT; i++) {
        sums[2 * warp * NUMBERS + lane + 32 * i] = weight_sum[i];
        sums[(2 * warp + 1) * NUMBERS + lane + 32 * i] = bias_sum[i];
    }
}
