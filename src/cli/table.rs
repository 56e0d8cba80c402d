//! Aligned columns.

use std::io::{self, Write};

use super::screen::escape;

/// Rows under their heads. On a terminal the flexible columns give way until the rows fit.
pub(super) struct Table {
    heads: Vec<&'static str>,
    flexible: Vec<usize>,
    rows: Vec<Vec<String>>,
}

const GAP: &str = "  ";
const FLEXIBLE_MIN: usize = 10;

impl Table {
    pub(super) fn new<const N: usize>(heads: [&'static str; N]) -> Self {
        Self { heads: heads.to_vec(), flexible: Vec::new(), rows: Vec::new() }
    }

    /// Pairs of a name and a value, without heads.
    pub(super) fn pairs() -> Self {
        Self { heads: Vec::new(), flexible: Vec::new(), rows: Vec::new() }
    }

    /// A column that may be cut, by its head.
    pub(super) fn cut(mut self, head: &str) -> Self {
        self.flexible.extend(self.heads.iter().position(|known| *known == head));
        self
    }

    pub(super) fn row<const N: usize>(&mut self, cells: [String; N]) {
        self.rows.push(cells.into_iter().map(|cell| escape(&cell).into_owned()).collect());
    }

    pub(super) fn pair(&mut self, name: &str, value: impl Into<String>) {
        self.row([name.to_owned(), value.into()]);
    }

    pub(super) fn write(&self, out: &mut impl Write, width: Option<usize>) -> io::Result<()> {
        let widths = self.widths(width);
        if !self.heads.is_empty() {
            let heads: Vec<String> = self.heads.iter().map(|head| (*head).to_owned()).collect();
            write_row(out, &heads, &widths)?;
        }
        self.rows.iter().try_for_each(|row| write_row(out, row, &widths))
    }

    /// How wide each column is; the widest flexible one gives way first.
    fn widths(&self, width: Option<usize>) -> Vec<usize> {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0).max(self.heads.len());
        let head = |column: usize| self.heads.get(column).map_or(0, |head| head.chars().count());
        let cells = |column: usize| self.rows.iter().filter_map(move |row| row.get(column)).map(|cell| cell.chars().count());
        let mut widths: Vec<usize> = (0..columns).map(|column| cells(column).max().unwrap_or(0).max(head(column))).collect();
        let Some(width) = width else { return widths };
        loop {
            let total = widths.iter().sum::<usize>() + GAP.len() * columns.saturating_sub(1);
            let over = total.saturating_sub(width);
            let widest = self.flexible.iter().copied().filter(|column| widths[*column] > FLEXIBLE_MIN).max_by_key(|column| widths[*column]);
            let (1.., Some(widest)) = (over, widest) else { return widths };
            let next = self.flexible.iter().filter(|column| **column != widest).map(|column| widths[*column]).max().unwrap_or(0);
            // Down to the next widest, so that those of one width give way together.
            let step = over.min(widths[widest] - FLEXIBLE_MIN).min((widths[widest] - next.min(widths[widest])).max(1));
            widths[widest] -= step;
        }
    }
}

/// Rows that are written as they come: columns grow when they have to, and on a terminal the last one is cut at its edge.
pub(super) struct Rolling<const N: usize> {
    heads: [&'static str; N],
    widths: [usize; N],
}

impl<const N: usize> Rolling<N> {
    pub(super) fn new(heads: [&'static str; N], widths: [usize; N]) -> Self {
        Self { heads, widths }
    }

    pub(super) fn write_heads(&self, out: &mut impl Write) -> io::Result<()> {
        let heads = self.heads.map(str::to_owned);
        write_row(out, &heads, &self.fitted(&heads, None))
    }

    pub(super) fn write(&mut self, out: &mut impl Write, width: Option<usize>, cells: [String; N]) -> io::Result<()> {
        let cells = cells.map(|cell| escape(&cell).into_owned());
        for (known, cell) in self.widths.iter_mut().zip(&cells).take(N.saturating_sub(1)) {
            *known = cell.chars().count().max(*known);
        }
        write_row(out, &cells, &self.fitted(&cells, width))
    }

    /// The widths for one row: the last cell has what is left.
    fn fitted(&self, cells: &[String], width: Option<usize>) -> Vec<usize> {
        let mut widths = self.widths.to_vec();
        let before: usize = widths.iter().rev().skip(1).map(|width| width + GAP.len()).sum();
        if let (Some(last), Some(cell)) = (widths.last_mut(), cells.last()) {
            let left = width.map_or(usize::MAX, |width| width.saturating_sub(before).max(FLEXIBLE_MIN));
            *last = cell.chars().count().min(left);
        }
        widths
    }
}

fn write_row(out: &mut impl Write, cells: &[String], widths: &[usize]) -> io::Result<()> {
    let mut line = String::new();
    for (cell, width) in cells.iter().zip(widths) {
        let length = cell.chars().count();
        if length > *width {
            line.extend(cell.chars().take(width.saturating_sub(1)));
            line.push('…');
        } else {
            line.push_str(cell);
            line.extend(std::iter::repeat_n(' ', width - length));
        }
        line.push_str(GAP);
    }
    writeln!(out, "{}", line.trim_end())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(table: &Table, width: Option<usize>) -> String {
        let mut out = Vec::new();
        table.write(&mut out, width).unwrap();
        String::from_utf8(out).unwrap()
    }

    fn sample() -> Table {
        let mut table = Table::new(["NAME", "STATUS", "TASK"]).cut("TASK");
        table.row(["größe".into(), "COMPLETE".into(), "count all the lines\nof every file".into()]);
        table.row(["b".into(), "FAILED".into(), "x".into()]);
        table
    }

    #[test]
    fn columns_line_up_by_characters() {
        assert_eq!(
            text(&sample(), None),
            "NAME   STATUS    TASK\ngröße  COMPLETE  count all the lines\\nof every file\nb      FAILED    x\n"
        );
    }

    #[test]
    fn a_terminal_cuts_only_what_may_be_cut() {
        assert_eq!(text(&sample(), Some(32)), "NAME   STATUS    TASK\ngröße  COMPLETE  count all the …\nb      FAILED    x\n");
        assert!(text(&sample(), Some(5)).contains("größe  COMPLETE  count all…\n"));
    }

    #[test]
    fn flexible_columns_give_way_together() {
        let mut table = Table::new(["A", "B"]).cut("A").cut("B");
        table.row(["a".repeat(40), "b".repeat(30)]);
        let line = text(&table, Some(42));
        assert_eq!(line.lines().nth(1).unwrap().chars().count(), 42);
        assert_eq!(line.matches('a').count(), line.matches('b').count());
    }

    #[test]
    fn rows_that_come_one_by_one_line_up_from_the_widest_on() {
        let (mut rolling, mut out) = (Rolling::new(["A", "B", "C"], [3, 2, 0]), Vec::new());
        rolling.write_heads(&mut out).unwrap();
        for cells in [["a", "b", "the first"], ["wider", "b", "\x1b[31m"], ["a", "b", "a text that is too long"]] {
            rolling.write(&mut out, Some(24), cells.map(str::to_owned)).unwrap();
        }
        let text = String::from_utf8(out).unwrap();
        assert_eq!(text, "A    B   C\na    b   the first\nwider  b   \\u{1b}[31m\na      b   a text that …\n");
    }

    #[test]
    fn an_empty_table_has_its_heads() {
        assert_eq!(text(&Table::new(["A", "B"]), Some(3)), "A  B\n");
        assert_eq!(text(&Table::pairs(), None), "");
    }
}
