// Tables that codes are looked up in, made once of a codebook of at most 256 entries.
//
// No include guard: attend.h includes this once.

namespace bitkv::BITKV_ISA {

constexpr int kEntries = 256;
constexpr float kLookupShare = 0.09f;  // of quantization's error that a rounding may add
constexpr int kBias = 90;              // the largest high part of a turned key: twice that, turned, fits in 16 bits
constexpr float kValueShare = 0.06f;   // entries of values, which are off by the same for all tokens

// What is made of a codebook once, head by head: tables of its channels, then numbers of channels.
//   values         bytes [2][width][256]: high and low parts of 256 high + low = (entry - middle) / unit
//   keys           float32 [width][256]
//   turned keys    bytes [2][width][256]: of 256 high + low = entry / unit; low is unsigned. Pairs share a unit.
//                  Where the high parts, rounded, are fine enough alone, then once more: as unsigned bytes, high + kBias
struct Tables {
  const uint8_t* data;
  int width;
  size_t bytes;  // of a channel's tables

  static size_t bytes_of_tables(TableKind kind) { return kind == TableKind::keys ? 4 * kEntries : 2 * kEntries; }
  static size_t head_bytes(int width, TableKind kind) {
    return size_t(width) * bytes_of_tables(kind) + (3 * size_t(width) + 16) * sizeof(float);
  }
  Tables(const Side& side, TableKind kind, int head)
      : data(side.tables + head % side.codebook.heads * head_bytes(side.width, kind)), width(side.width),
        bytes(bytes_of_tables(kind)) {}

  const float* floats_of(int channel) const { return reinterpret_cast<const float*>(data) + channel * kEntries; }
  const uint8_t* of(int channel) const { return data + channel * kEntries; }
  size_t low() const { return size_t(width) * kEntries; }  // between the parts of a channel
  const uint8_t* biased(int channel) const { return of(channel) + low(); }
  const float* units() const { return reinterpret_cast<const float*>(data + width * bytes); }
  const float* middles() const { return units() + width; }
  const float* energies() const { return middles(); }  // of turned keys, whose middles are zero: mean squares
  const float* errors() const { return middles() + width; }  // squared, that quantization makes, at least
  float spread() const { return errors()[width]; }      // the variance of entries over that error
  bool is_fine() const { return errors()[width + 1] != 0; }  // whether bytes need their low parts
  // turned keys: whether they may be rounded to bytes when they are turned, and their mean squares in units, summed
  bool are_coarse() const { return errors()[width + 2] != 0; }
  float squares() const { return errors()[width + 3]; }
};

// What a codebook's own cells say of the error of its codes, per channel: a fraction of the squared distance
// between neighbouring entries, which is smaller than what data with tails see.
inline float cell_error(const float* x, int channels, int entries, std::vector<float>& room) {
  room.assign(entries, FLT_MAX);
  if (entries == 1) return 0;
  for (int e = 0; e < entries; ++e) {
    float near = FLT_MAX;
    for (int f = 0; f < entries; ++f) {
      float square = 0;
      for (int c = 0; c < channels; ++c) {
        const float d = x[e * channels + c] - x[f * channels + c];
        square += d * d;
      }
      if (f != e) near = std::min(near, square);
    }
    room[e] = near;
  }
  std::nth_element(room.begin(), room.begin() + entries / 2, room.end());
  // of the densest lattices with so many channels, whose cells are the smallest
  const float cell = channels == 1 ? 0.083f : channels == 2 ? 0.069f : channels <= 4 ? 0.054f : 0.036f;
  return cell * room[entries / 2];
}

// Where the low part is not signed, the high one is the floor.
inline void put_bytes(uint8_t* high_at, uint8_t* low_at, int number, bool low_is_signed) {
  const int low = low_is_signed ? (number + 128) % 256 - 128 : number & 255;
  const int wrapped = low_is_signed && low < -128 ? low + 256 : low;
  *high_at = uint8_t((number - wrapped) / 256), *low_at = uint8_t(wrapped);
}

// The tables of one head.
inline void tabulate_head(const TablesRequest& r, int head) {
  const int width = r.width, channels = r.codebook.channels, entries = r.codebook.entries;
  uint8_t* out = r.out + head * Tables::head_bytes(width, r.kind);
  float* units = reinterpret_cast<float*>(out + width * Tables::bytes_of_tables(r.kind));
  float *middles = units + width, *errors = middles + width;
  std::vector<float> room, energies(width);
  const auto entry = [&](int e, int c) {  // those beyond the end repeat the first
    return r.codebook.of(head, c / channels)[(e < entries ? e : 0) * channels + c % channels];
  };
  double variance = 0, error = 0, rounding = 0, in_units = 0;
  for (int c = 0; c < width; ++c) {
    float low = entry(0, c), high = low;
    double total = 0, squares = 0;
    for (int e = 0; e < entries; ++e) {
      const float x = entry(e, c);
      low = std::min(low, x), high = std::max(high, x), total += x;
    }
    middles[c] = r.kind == TableKind::values ? (low + high) / 2 : 0;
    for (int e = 0; e < entries; ++e) squares += (entry(e, c) - middles[c]) * (entry(e, c) - middles[c]);
    const float top = std::max({high - middles[c], middles[c] - low, 1e-30f});
    units[c] = top / (r.kind == TableKind::values ? 32512 : 256 * kBias);
    energies[c] = float(squares / entries);
    in_units += energies[c] / (units[c] * units[c]);
    errors[c] = c % channels ? errors[c - 1] : cell_error(r.codebook.of(head, c / channels), channels, entries, room);
    variance += squares / entries, error += errors[c], rounding += 65536.0 / 12 * units[c] * units[c];
  }
  errors[width] = float(variance / std::max(error, 1e-30));
  const float share = r.kind == TableKind::values ? kValueShare : kLookupShare;
  const bool is_fine = rounding > share * share * error;
  errors[width + 1] = is_fine;
  const double angles = variance * 2 / (12 * 127 * 127);  // of rounding cosines and sines to bytes
  errors[width + 2] = 2 * rounding + angles <= share * share * error;
  errors[width + 3] = float(in_units);
  for (int c = 0; c < r.pairs; ++c) units[c] = units[c + r.pairs] = std::max(units[c], units[c + r.pairs]);
  const bool low_is_signed = r.kind == TableKind::values || !is_fine;
  for (int c = 0; c < width; ++c) {
    for (int e = 0; e < kEntries; ++e) {
      const float x = entry(e, c);
      const size_t at = size_t(c) * kEntries + e, low_at = size_t(width) * kEntries + at;
      if (r.kind == TableKind::keys) std::memcpy(out + at * sizeof x, &x, sizeof x);
      else put_bytes(out + at, out + low_at, int(std::nearbyint((x - middles[c]) / units[c])), low_is_signed);
      if (r.kind == TableKind::turned_keys && !is_fine) out[low_at] = uint8_t(int8_t(out[at]) + kBias);
    }
  }
  if (r.kind == TableKind::turned_keys) std::copy(energies.begin(), energies.end(), middles);
}

size_t tabulate(const TablesRequest& r) {
  if (r.out) parallel_for(r.codebook.heads, r.threads, [&](int head) { tabulate_head(r, head); });
  return r.codebook.heads * Tables::head_bytes(r.width, r.kind);
}

}  // namespace bitkv::BITKV_ISA
