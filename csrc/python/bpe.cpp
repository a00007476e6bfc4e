// Byte-pair-encoding trainer: texts are split by GPT-2's pattern into pieces, the distinct pieces are counted, and the
// most frequent pair of neighbouring tokens is joined again and again (Sennrich et al., 2016; Radford et al., 2019).
//
// llmfast/tokenizer/bpe_train.py is the readable twin of this file and gives the same tokens. What makes this one fast:
//  - the split is a hand-written scanner over UTF-8 with one table of character classes;
//  - the symbols of all pieces lie in one array of linked nodes, and every pair remembers where it occurs, so that a
//    merge costs time in proportion to its occurrences, whatever the length of a piece;
//  - the best pair comes from a heap whose stale entries are put right when they come up.

#include "bpe.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <queue>
#include <stdexcept>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace {

constexpr size_t kCodePoints = 0x110000;
enum Class : uint8_t { kOther = 0, kLetter = 1, kNumber = 2, kSpace = 3 };

uint64_t mix(uint64_t x) {  // the finaliser of splitmix64
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  return x ^ (x >> 31);
}

// Distinct pieces with their counts: open addressing over pieces that lie end to end in one string.
class PieceTable {
 public:
  struct Piece {
    uint64_t hash;
    uint64_t begin;
    uint64_t length;
    uint64_t count;
  };

  void add(std::string_view piece) {
    if (pieces_.size() * 2 >= slots_.size()) grow();
    const uint64_t hash = hash_of(piece);
    size_t slot = hash & (slots_.size() - 1);
    for (; slots_[slot] != kEmpty; slot = (slot + 1) & (slots_.size() - 1)) {
      Piece& known = pieces_[slots_[slot]];
      if (known.hash == hash && bytes(known) == piece) {
        ++known.count;
        return;
      }
    }
    if (pieces_.size() == kEmpty) throw std::length_error("the text has more than 4 billion distinct pieces");
    slots_[slot] = static_cast<uint32_t>(pieces_.size());
    pieces_.push_back({hash, text_.size(), piece.size(), 1});
    text_.append(piece);
  }

  const std::vector<Piece>& pieces() const { return pieces_; }
  std::string_view bytes(const Piece& piece) const { return {text_.data() + piece.begin, piece.length}; }

 private:
  static constexpr uint32_t kEmpty = std::numeric_limits<uint32_t>::max();

  static uint64_t hash_of(std::string_view piece) {
    uint64_t hash = piece.size() * 0x9e3779b97f4a7c15ULL;
    const char* at = piece.data();
    size_t left = piece.size();
    for (uint64_t word; left >= 8; at += 8, left -= 8) {
      std::memcpy(&word, at, 8);
      hash = mix(hash ^ word);
    }
    uint64_t tail = 0;
    for (size_t i = 0; i < left; ++i) tail = tail << 8 | static_cast<uint8_t>(at[i]);
    return mix(hash ^ tail);
  }

  void grow() {
    slots_.assign(std::max<size_t>(1 << 12, slots_.size() * 2), kEmpty);
    for (size_t i = 0; i < pieces_.size(); ++i) {
      size_t slot = pieces_[i].hash & (slots_.size() - 1);
      while (slots_[slot] != kEmpty) slot = (slot + 1) & (slots_.size() - 1);
      slots_[slot] = static_cast<uint32_t>(i);
    }
  }

  std::vector<uint32_t> slots_;
  std::vector<Piece> pieces_;
  std::string text_;
};

// GPT-2's pattern by hand: 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
class Splitter {
 public:
  Splitter(const uint8_t* classes, std::string_view text) : classes_(classes), text_(text) {}

  // The end of the piece that starts at `begin` < text.size().
  size_t piece_end(size_t begin) const {
    if (text_[begin] == '\'') {
      if (const size_t length = contraction(text_.substr(begin + 1, 2))) return begin + 1 + length;
    }
    auto [kind, next] = classify(begin);
    if (text_[begin] == ' ' && next < text_.size()) {
      const auto [follower, after] = classify(next);
      if (follower != kSpace) {
        kind = follower;
        next = after;
      }
    }
    size_t last = begin;  // where the run's last character starts
    while (next < text_.size()) {
      const auto [following, after] = classify(next);
      if (following != kind) {
        // A run of white space leaves its last character to the word behind it.
        return kind == kSpace && last > begin ? last : next;
      }
      last = next;
      next = after;
    }
    return next;
  }

 private:
  static size_t contraction(std::string_view after) {
    if (after.empty()) return 0;
    if (after[0] == 's' || after[0] == 't' || after[0] == 'm' || after[0] == 'd') return 1;
    return after == "re" || after == "ve" || after == "ll" ? 2 : 0;
  }

  // Class of the (valid UTF-8) character at `at`, and where the next one starts.
  std::pair<uint8_t, size_t> classify(size_t at) const {
    const auto byte = [&](size_t i) { return static_cast<uint32_t>(static_cast<uint8_t>(text_[at + i])); };
    const uint32_t first = byte(0);
    if (first < 0x80) return {classes_[first], at + 1};
    if (first < 0xe0) return {classes_[(first & 0x1f) << 6 | (byte(1) & 0x3f)], at + 2};
    if (first < 0xf0) return {classes_[(first & 0x0f) << 12 | (byte(1) & 0x3f) << 6 | (byte(2) & 0x3f)], at + 3};
    const uint32_t code = (first & 0x07) << 18 | (byte(1) & 0x3f) << 12 | (byte(2) & 0x3f) << 6 | (byte(3) & 0x3f);
    return {classes_[code], at + 4};
  }

  const uint8_t* classes_;
  std::string_view text_;
};

// The symbols of all pieces as one array of linked nodes, and the merges over them.
class Merger {
 public:
  explicit Merger(const PieceTable& table) {
    size_t symbols = 0;
    for (const auto& piece : table.pieces()) symbols += piece.length;
    if (symbols >= kNone) throw std::length_error("the distinct pieces of the text hold more than 4 billion bytes");
    nodes_.reserve(symbols);
    counts_.reserve(table.pieces().size());
    for (int byte = 0; byte < 256; ++byte) tokens_.emplace_back(1, static_cast<char>(byte));
    for (const auto& piece : table.pieces()) {
      const auto first = static_cast<uint32_t>(nodes_.size());
      const auto id = static_cast<uint32_t>(counts_.size());
      counts_.push_back(static_cast<int64_t>(piece.count));
      for (const char byte : table.bytes(piece)) {
        const auto at = static_cast<uint32_t>(nodes_.size());
        nodes_.push_back({static_cast<uint8_t>(byte), at == first ? kNone : at - 1, at + 1, id});
      }
      nodes_.back().next = kNone;
    }
    for (uint32_t at = 0; at < nodes_.size(); ++at) add_pair(at);
    queue_grown();
  }

  // Joins the best pair into a new token; false if no pair occurs `min_count` times.
  bool merge_best(int64_t min_count) {
    const std::optional<Key> best = pop_best(min_count);
    if (!best) return false;
    tokens_.push_back(tokens_[left(*best)] + tokens_[right(*best)]);
    merge(*best, static_cast<uint32_t>(tokens_.size() - 1));
    return true;
  }

  // The bytes of each token: the 256 single bytes, then those that merges made.
  const std::vector<std::string>& tokens() const { return tokens_; }

 private:
  using Key = uint64_t;  // a pair of token ids, the left one in the upper half: equal counts go to the smaller key
  static constexpr uint32_t kNone = std::numeric_limits<uint32_t>::max();

  struct Node {
    uint32_t symbol;  // kNone once the node was joined to its left neighbour
    uint32_t prev;
    uint32_t next;  // kNone at the ends of a piece
    uint32_t piece;
  };
  struct Pair {
    int64_t count = 0;
    bool grown = false;            // since it was last queued
    std::vector<uint32_t> places;  // nodes where the pair begins, or once began; ascending, as all come from one merge
  };
  struct Candidate {
    int64_t count;
    Key key;
    bool operator<(const Candidate& other) const {
      return count != other.count ? count < other.count : key > other.key;
    }
  };
  struct KeyHash {
    size_t operator()(Key key) const { return mix(key); }
  };

  static uint32_t left(Key key) { return static_cast<uint32_t>(key >> 32); }
  static uint32_t right(Key key) { return static_cast<uint32_t>(key); }
  Key key_at(uint32_t at) const { return static_cast<Key>(nodes_[at].symbol) << 32 | nodes_[nodes_[at].next].symbol; }

  void add_pair(uint32_t at) {
    if (at == kNone || nodes_[at].next == kNone) return;
    const Key key = key_at(at);
    Pair& pair = pairs_[key];
    pair.count += counts_[nodes_[at].piece];
    pair.places.push_back(at);
    if (!pair.grown) grown_.push_back(key);
    pair.grown = true;
  }

  void remove_pair(uint32_t at) {
    if (at == kNone || nodes_[at].next == kNone) return;
    const auto found = pairs_.find(key_at(at));
    if (found == pairs_.end()) return;  // the pair that is being merged, overlapping itself
    found->second.count -= counts_[nodes_[at].piece];
    if (found->second.count == 0) pairs_.erase(found);
  }

  // Every pair has an entry in the queue that is at least its count: growth is queued here, and a count that has shrunk
  // since is put right in pop_best.
  void queue_grown() {
    for (const Key key : grown_) {
      const auto found = pairs_.find(key);
      if (found == pairs_.end()) continue;
      found->second.grown = false;
      queue_.push({found->second.count, key});
    }
    grown_.clear();
  }

  std::optional<Key> pop_best(int64_t min_count) {
    while (!queue_.empty() && queue_.top().count >= min_count) {
      const Candidate top = queue_.top();
      queue_.pop();
      const auto found = pairs_.find(top.key);
      if (found == pairs_.end()) continue;
      if (found->second.count == top.count) return top.key;
      if (found->second.count < top.count) queue_.push({found->second.count, top.key});
    }
    return std::nullopt;
  }

  void merge(Key key, uint32_t joined) {
    const auto found = pairs_.find(key);
    const std::vector<uint32_t> places = std::move(found->second.places);
    pairs_.erase(found);
    for (const uint32_t at : places) {
      Node& node = nodes_[at];
      if (node.symbol != left(key) || node.next == kNone || nodes_[node.next].symbol != right(key)) continue;
      Node& absorbed = nodes_[node.next];
      remove_pair(node.prev);
      remove_pair(node.next);
      node.symbol = joined;
      node.next = absorbed.next;
      absorbed.symbol = kNone;
      if (node.next != kNone) nodes_[node.next].prev = at;
      add_pair(node.prev);
      add_pair(at);
    }
    queue_grown();
  }

  std::vector<Node> nodes_;
  std::vector<int64_t> counts_;  // how often each piece occurs
  std::unordered_map<Key, Pair, KeyHash> pairs_;
  std::vector<Key> grown_;
  std::priority_queue<Candidate> queue_;
  std::vector<std::string> tokens_;
};

class BpeTrainer {
 public:
  explicit BpeTrainer(std::string classes) : classes_(std::move(classes)) {
    if (classes_.size() != kCodePoints) throw std::invalid_argument("classes must hold one byte a code point");
  }

  void add(const py::str& text) {
    Py_ssize_t size = 0;
    const char* utf8 = PyUnicode_AsUTF8AndSize(text.ptr(), &size);
    if (utf8 == nullptr) throw py::error_already_set();
    const std::string_view view(utf8, static_cast<size_t>(size));
    const py::gil_scoped_release nogil;
    const Splitter splitter(reinterpret_cast<const uint8_t*>(classes_.data()), view);
    for (size_t begin = 0; begin < view.size();) {
      const size_t end = splitter.piece_end(begin);
      pieces_.add(view.substr(begin, end - begin));
      begin = end;
    }
  }

  py::dict pieces() const {
    py::dict counts;
    for (const auto& piece : pieces_.pieces()) {
      const std::string_view bytes = pieces_.bytes(piece);
      counts[py::bytes(bytes.data(), bytes.size())] = piece.count;
    }
    return counts;
  }

  std::vector<py::bytes> train(size_t merges, int64_t min_count, const std::optional<py::function>& progress) const {
    std::optional<Merger> merger;
    {
      const py::gil_scoped_release nogil;
      merger.emplace(pieces_);
      for (size_t done = 1; done <= merges && merger->merge_best(min_count); ++done) {
        if (done % kReport != 0) continue;
        const py::gil_scoped_acquire gil;
        if (PyErr_CheckSignals() != 0) throw py::error_already_set();
        if (progress) (*progress)(done, merges);
      }
    }
    return {merger->tokens().begin() + 256, merger->tokens().end()};
  }

 private:
  static constexpr size_t kReport = 64;  // merges between two reports and looks for Ctrl-C

  std::string classes_;
  PieceTable pieces_;
};

}  // namespace

void register_bpe(py::module_& module) {
  py::class_<BpeTrainer>(module, "BpeTrainer", "Trains a byte-pair encoding; one thread at a time.")
      .def(py::init<std::string>(), py::arg("classes"),
           "classes: 0x110000 bytes, for each code point 0 other, 1 letter, 2 number, 3 white space.")
      .def("add", &BpeTrainer::add, py::arg("text"), "Splits a text without surrogates and counts its pieces.")
      .def("pieces", &BpeTrainer::pieces, "The distinct pieces so far, {bytes: count}.")
      .def("train", &BpeTrainer::train, py::arg("merges"), py::arg("min_count"), py::arg("progress") = py::none(),
           "The new tokens (bytes) in order, at most `merges`; progress(done, merges) is called on the way.");
}
