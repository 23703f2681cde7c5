// Sphere tracing: CUDA kernels, a thread per ray.
//
// `tracing.py` compiles this file at run time; its `march` is the reference for the one here, `toy_render.distance` and
// `thing_shapes.Shape.distance` for the two distances. Plain torch launches some 25 kernels a step.
//
// The compiler's options define SURFACE, STRIDE and CHECK_EVERY of `tracing.py`.
//
// Shapes: R rays, P parts or primitives, W waves. Points and lengths are in the body's own axes and units.


// ---------------------------------------------------------------------------------------------- a toy

// As `toy_shapes.Toy` says.
struct Toy {
    const float* frames;         // (3, P, 5)
    const float* box;            // (3, P)
    const float* inverse_radii;  // (3, P)
    int primitives;              // P
    int blended;
    float blend;

    __device__ float distance(float3 point) const
    {
        float homogeneous[5] = {point.x, fabsf(point.x), point.y, point.z, 1};
        float sum = 0;
        float rest = 1e30f;
        for (int i = 0; i < primitives; i++) {
            float outside = 0;
            float slope = 0;
            for (int axis = 0; axis < 3; axis++) {
                int row = axis * primitives + i;
                float q = 0;
                for (int k = 0; k < 5; k++)
                    q += frames[5 * row + k] * homogeneous[k];
                q = fmaxf(fabsf(q) - box[row], 1e-4f);
                outside += q * q;
                slope += q * inverse_radii[row] * q * inverse_radii[row];
            }

            // Those that melt into each other come first.
            float f = sqrtf(outside);
            float away = (f - 1) * f / sqrtf(slope);
            if (i < blended)
                sum += expf(-away / blend);
            else
                rest = fminf(rest, away);
        }
        return fminf(-blend * logf(fmaxf(sum, 1e-37f)), rest);
    }
};


// ---------------------------------------------------------------------------------------------- a thing

// As `thing_shapes.Shape` says.
struct Thing {
    const float* frames;    // (3, P, 4)
    const float* power;     // (P)
    const float* squash;    // (P)
    const float* reach;     // (P, 2)
    const float* pictures;  // (P, rows, columns)
    const float* waves;     // (4, W)
    const float* steep;     // (1) how much steeper the ripples make the distance
    int parts;              // P
    int solid;
    int rows;
    int columns;
    int wave_count;         // W
    float blend;            // not 0
    float ripple;

    // The number of a picture at a place, from 0 to 1 in both directions, interpolated; beyond its border that of it.
    __device__ float look_up(const float* picture, float x, float y) const
    {
        x = fminf(fmaxf(x, 0), 1) * (columns - 1);
        y = fminf(fmaxf(y, 0), 1) * (rows - 1);
        int left = min((int)x, columns - 2);
        int top = min((int)y, rows - 2);
        const float* corner = picture + top * columns + left;
        float upper = corner[0] + (x - left) * (corner[1] - corner[0]);
        float lower = corner[columns] + (x - left) * (corner[columns + 1] - corner[columns]);
        return upper + (y - top) * (lower - upper);
    }

    // At most the distance to one part.
    __device__ float part_distance(int i, float3 point) const
    {
        // Into the half plane.
        float q[3];
        for (int axis = 0; axis < 3; axis++) {
            const float* row = frames + 4 * (axis * parts + i);
            q[axis] = row[0] * point.x + row[1] * point.y + row[2] * point.z + row[3];
        }
        float rho = sqrtf(q[0] * q[0] + q[2] * q[2]);
        if (power[i] != 2)
            rho = powf(powf(fabsf(q[0]), power[i]) + powf(fabsf(q[2]), power[i]), 1 / power[i]);

        // There into the picture; outside of it, nothing is nearer than this.
        float width = reach[2 * i];
        float height = reach[2 * i + 1];
        float found = look_up(pictures + i * rows * columns, rho / width, (q[1] / height + 1) / 2);
        float x = fmaxf(rho - width, 0);
        float y = fmaxf(fabsf(q[1]) - height, 0);
        if (x > 0 || y > 0)
            found = sqrtf(x * x + y * y + found * found);
        return found * squash[i];
    }

    __device__ float distance(float3 point) const
    {
        // The solid parts melt together: a log-sum-exp, relative to the nearest so far. The others are cut out.
        float nearest = 1e30f;
        float sum = 0;
        float cut = 1e30f;
        for (int i = 0; i < parts; i++) {
            float away = part_distance(i, point);
            if (i < solid) {
                float lower = fminf(nearest, away);
                sum = sum * expf((lower - nearest) / blend) + expf((lower - away) / blend);
                nearest = lower;
            } else {
                cut = fminf(cut, away);
            }
        }
        float value = fmaxf(nearest - blend * logf(sum), -cut);

        // Ripples.
        if (ripple != 0) {
            float height = 0;
            for (int i = 0; i < wave_count; i++) {
                const float* wave = waves + i;
                height += cosf(point.x * wave[0] + point.y * wave[wave_count] + point.z * wave[2 * wave_count]
                               + wave[3 * wave_count]);
            }
            value += height / wave_count * ripple;
        }
        return value / *steep;
    }
};


// ---------------------------------------------------------------------------------------------- the march

template <class Body>
__device__ void march(const Body& body, const float3* origins, const float3* directions, const float* start,
                      const float* far, float* length, bool* arrived, int rays, float cone, int steps)
{
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= rays)
        return;
    float3 origin = origins[i];
    float3 along = directions[i];
    float t = start[i];
    bool near_by = false;
    bool done = false;

    for (int step = 0; step < steps && !done; step++) {
        // The free space around the cone's end; it has arrived where that is no wider than itself.
        float width = cone * t;
        float3 point = {origin.x + t * along.x, origin.y + t * along.y, origin.z + t * along.z};
        float free = body.distance(point) - width;
        near_by = free < fmaxf(width, SURFACE);

        // Go on through the free space, or back out if already inside.
        float forward = fmaxf(free * (0.95f / (1 + cone)), STRIDE * step);
        t += near_by ? fminf(free, 0) : forward;

        // Only every few steps is it asked who has arrived or left.
        if ((step + 1) % CHECK_EVERY == 0)
            done = near_by || !(t < far[i]);
    }
    length[i] = t;
    arrived[i] = done ? near_by : cone > 0;
}

// Each takes its body, then rays (R): origins, directions, lengths to start from and to end at, and gives `length` and
// `arrived`.
extern "C" __global__ void march_toy(
    const float* frames, const float* box, const float* inverse_radii, int primitives, int blended, double blend,
    const float3* origins, const float3* directions, const float* start, const float* far,
    float* length, bool* arrived, int rays, double cone, int steps)
{
    Toy toy = {frames, box, inverse_radii, primitives, blended, (float)blend};
    march(toy, origins, directions, start, far, length, arrived, rays, cone, steps);
}

extern "C" __global__ void march_thing(
    const float* frames, const float* power, const float* squash, const float* reach, const float* pictures,
    const float* waves, const float* steep, int parts, int solid, int rows, int columns, int wave_count, double blend,
    double ripple,
    const float3* origins, const float3* directions, const float* start, const float* far,
    float* length, bool* arrived, int rays, double cone, int steps)
{
    Thing thing = {frames, power, squash, reach, pictures, waves, steep, parts, solid, rows, columns, wave_count,
                   (float)blend, (float)ripple};
    march(thing, origins, directions, start, far, length, arrived, rays, cone, steps);
}
