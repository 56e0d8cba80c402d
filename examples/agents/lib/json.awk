# json(s): s as a JSON string, whatever bytes it holds; bytes that are no UTF-8 become U+FFFD. Run with LC_ALL=C.
function json_begin(   i) {
  for (i = 1; i < 256; i++) json_ord[sprintf("%c", i)] = i
  json_ready = 1
}
function json(s,   out, i, n, c, o, need, k, ok) {
  if (!json_ready) json_begin()
  out = "\""
  n = length(s)
  for (i = 1; i <= n; i++) {
    c = substr(s, i, 1)
    o = json_ord[c] + 0
    if (c == "\"" || c == "\\") out = out "\\" c
    else if (o < 32 || o == 127) out = out sprintf("\\u%04x", o)
    else if (o < 128) out = out c
    else {
      need = (o >= 194 && o <= 223) ? 1 : (o >= 224 && o <= 239) ? 2 : (o >= 240 && o <= 244) ? 3 : 0
      ok = need > 0 && i + need <= n
      for (k = 1; ok && k <= need; k++) {
        lo = 128; hi = 191
        if (k == 1 && o == 224) lo = 160
        if (k == 1 && o == 237) hi = 159
        if (k == 1 && o == 240) lo = 144
        if (k == 1 && o == 244) hi = 143
        b = json_ord[substr(s, i + k, 1)] + 0
        if (b < lo || b > hi) ok = 0
      }
      if (ok) { out = out substr(s, i, need + 1); i += need }
      else out = out "\357\277\275"
    }
  }
  return out "\""
}
# repeated(s, n): s n times; old awks know no {n} in patterns.
function repeated(s, n,   out) {
  out = ""
  while (n-- > 0) out = out s
  return out
}
