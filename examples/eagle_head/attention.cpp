// One decode step's attention over a bf16 KV cache: rotate, write, attend to as much as is there.
// Every request stops at its own length, where batched products would run to the longest one's.

#include <ATen/Parallel.h>
#include <torch/extension.h>

#include <cmath>
#include <vector>

namespace {

using Half = c10::BFloat16;

void rotate(const Half* from, const float* cos, const float* sin, int64_t half, float* to) {
  for (int64_t i = 0; i < half; ++i) {
    const float a = from[i], b = from[i + half];
    to[i] = a * cos[i] - b * sin[i];
    to[i + half] = b * cos[i] + a * sin[i];
  }
}

template <int group, int width>
void attend(const float (&query)[group][width], const Half* keys, const Half* values, int64_t count,
            int64_t room, std::vector<float>& scores, Half* out) {
  float most[group], total[group], sum[group][width] = {}, entry[width];
  std::fill(most, most + group, -1e30f);
  for (int64_t j = 0; j < count; ++j) {
    for (int d = 0; d < width; ++d) entry[d] = keys[j * width + d];
    for (int g = 0; g < group; ++g) {
      float score = 0;
      for (int d = 0; d < width; ++d) score += entry[d] * query[g][d];
      scores[g * room + j] = score;
      most[g] = std::max(most[g], score);
    }
  }
  for (int g = 0; g < group; ++g) {
    total[g] = 0;
    for (int64_t j = 0; j < count; ++j) {
      float& score = scores[g * room + j];
      score = std::exp(score - most[g]);
      total[g] += score;
    }
  }
  for (int64_t j = 0; j < count; ++j) {
    for (int d = 0; d < width; ++d) entry[d] = values[j * width + d];
    for (int g = 0; g < group; ++g) {
      for (int d = 0; d < width; ++d) sum[g][d] += scores[g * room + j] * entry[d];
    }
  }
  for (int g = 0; g < group; ++g) {
    for (int d = 0; d < width; ++d) out[g * width + d] = sum[g][d] / total[g];
  }
}

// qkv [bs, heads + 2 * kv_heads, width] bf16; keys, values [bs, kv_heads, room, width] bf16, written
// to; positions [bs] int64; cos, sin [room, width / 2] fp32. Returns [bs, heads * width] bf16.
at::Tensor decode_attention(at::Tensor qkv, at::Tensor keys, at::Tensor values,
                            at::Tensor positions, at::Tensor cos, at::Tensor sin) {
  constexpr int group = 3, width = 64, half = width / 2;
  const int64_t bs = qkv.size(0), kv_heads = keys.size(1), room = keys.size(2);
  const int64_t heads = group * kv_heads, rows = heads + 2 * kv_heads;
  TORCH_CHECK(qkv.size(1) == rows * width && keys.size(3) == width, "3 query heads of 64 a key head");
  TORCH_CHECK(qkv.is_contiguous() && keys.is_contiguous() && values.is_contiguous(), "contiguous");
  auto out = at::empty({bs, heads * width}, qkv.options());
  const Half* in = qkv.data_ptr<Half>();
  Half *k = keys.data_ptr<Half>(), *v = values.data_ptr<Half>(), *o = out.data_ptr<Half>();
  const int64_t* at = positions.data_ptr<int64_t>();
  const float *c = cos.data_ptr<float>(), *s = sin.data_ptr<float>(), scale = 1 / std::sqrt(1.f * width);
  at::parallel_for(0, bs * kv_heads, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scores(group * room);
    float query[group][width], key[width];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / kv_heads, h = i % kv_heads, pos = at[b];
      const Half* row = in + b * rows * width;
      Half *mine = k + i * room * width, *its = v + i * room * width;
      for (int g = 0; g < group; ++g) {
        rotate(row + (h * group + g) * width, c + pos * half, s + pos * half, half, query[g]);
        for (int d = 0; d < width; ++d) query[g][d] *= scale;
      }
      rotate(row + (heads + h) * width, c + pos * half, s + pos * half, half, key);
      for (int d = 0; d < width; ++d) {
        mine[pos * width + d] = key[d];
        its[pos * width + d] = row[(heads + kv_heads + h) * width + d];
      }
      attend<group, width>(query, mine, its, pos + 1, room, scores,
                           o + (b * heads + h * group) * width);
    }
  });
  return out;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) { m.def("decode_attention", &decode_attention); }
