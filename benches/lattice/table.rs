//! Aligned tables on standard output.

use std::time::Duration;

/// Rows below a title; the first column is aligned to the left, the others to the right.
pub(crate) struct Table {
    title: String,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with a head.
    pub(crate) fn new(title: &str, head: &[&str]) -> Self {
        let mut table = Self { title: title.to_owned(), rows: Vec::new() };
        table.row(head);
        table
    }

    /// Adds a row.
    pub(crate) fn row(&mut self, cells: &[&str]) {
        self.rows.push(cells.iter().map(|&cell| cell.to_owned()).collect());
    }

    /// Prints it.
    pub(crate) fn print(&self) {
        let width = |column: usize| self.rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
        println!("\n{}", self.title);
        for row in &self.rows {
            let cells = row.iter().enumerate().map(|(column, cell)| {
                let width = width(column).unwrap_or_default();
                if column == 0 { format!("{cell:<width$}") } else { format!("{cell:>width$}") }
            });
            println!("  {}", cells.collect::<Vec<_>>().join("  ").trim_end());
        }
    }
}

/// A short time.
pub(crate) fn micros(time: Duration) -> String {
    if time < Duration::from_millis(10) { format!("{} us", time.as_micros()) } else { format!("{:.1} ms", time.as_secs_f64() * 1e3) }
}

/// A rate.
pub(crate) fn per_second(rate: f64) -> String {
    format!("{rate:.0}")
}
