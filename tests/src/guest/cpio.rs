//! The newc cpio format, as the kernel unpacks it (Documentation/driver-api/early-userspace/buffer-format.rst).

use std::collections::BTreeMap;
use std::io::{self, Write};

enum Entry {
    File { mode: u32, bytes: Vec<u8> },
    Link(String),
}

/// A file tree on its way into an archive. Directories appear as they are needed; everything belongs to root.
#[derive(Default)]
pub(super) struct Tree {
    entries: BTreeMap<String, Entry>,
}

impl Tree {
    /// Paths are absolute; a later file replaces an earlier one.
    pub(super) fn file(&mut self, path: &str, mode: u32, bytes: impl Into<Vec<u8>>) {
        self.insert(path, Entry::File { mode, bytes: bytes.into() });
    }

    pub(super) fn link(&mut self, path: &str, target: &str) {
        self.insert(path, Entry::Link(target.to_owned()));
    }

    pub(super) fn contains(&self, path: &str) -> bool {
        self.entries.contains_key(path.trim_start_matches('/'))
    }

    fn insert(&mut self, path: &str, entry: Entry) {
        self.entries.insert(path.trim_start_matches('/').to_owned(), entry);
    }

    /// `directories`: those to have beside the ones that hold something.
    pub(super) fn write(&self, directories: &[&str], output: &mut impl Write) -> io::Result<()> {
        let mut number = 0;
        let mut made = std::collections::BTreeSet::new();
        let mut parents = |path: &str, output: &mut dyn Write, number: &mut u32| -> io::Result<()> {
            for (end, _) in path.match_indices('/') {
                if made.insert(path[..end].to_owned()) {
                    record(output, number, &path[..end], 0o40755, b"")?;
                }
            }
            Ok(())
        };
        for directory in directories {
            parents(&format!("{}/", directory.trim_matches('/')), output, &mut number)?;
        }
        for (path, entry) in &self.entries {
            parents(path, output, &mut number)?;
            match entry {
                Entry::File { mode, bytes } => record(output, &mut number, path, 0o100_000 | mode, bytes)?,
                Entry::Link(target) => record(output, &mut number, path, 0o120_777, target.as_bytes())?,
            }
        }
        record(output, &mut 0, "TRAILER!!!", 0, b"")
    }
}

fn record(output: &mut dyn Write, number: &mut u32, name: &str, mode: u32, bytes: &[u8]) -> io::Result<()> {
    *number += 1;
    let length = u32::try_from(bytes.len()).map_err(io::Error::other)?;
    let links = if mode & 0o170_000 == 0o40_000 { 2 } else { 1 };
    // inode, mode, uid, gid, links, mtime, size, device and rdev numbers, name size with NUL, checksum
    let fields = [*number, mode, 0, 0, links, 0, length, 0, 0, 0, 0, name.len() as u32 + 1, 0];
    output.write_all(b"070701")?;
    for field in fields {
        write!(output, "{field:08X}")?;
    }
    output.write_all(name.as_bytes())?;
    output.write_all(b"\0")?;
    // The header is 110 bytes; name and content each end on a multiple of four.
    pad(output, 110 + name.len() + 1)?;
    output.write_all(bytes)?;
    pad(output, bytes.len())
}

fn pad(output: &mut dyn Write, length: usize) -> io::Result<()> {
    output.write_all(&[0; 3][..length.wrapping_neg() % 4])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parents_come_first_and_records_are_aligned() {
        let mut tree = Tree::default();
        tree.file("/a/b/file", 0o755, *b"12345");
        tree.link("/a/link", "b/file");
        let mut bytes = Vec::new();
        tree.write(&["/proc"], &mut bytes).unwrap();
        assert_eq!(bytes.len() % 4, 0);
        let names: Vec<_> = bytes
            .windows(6)
            .enumerate()
            .filter(|(_, magic)| magic == b"070701")
            .map(|(at, _)| {
                assert_eq!(at % 4, 0);
                let name = &bytes[at + 110..];
                let end = name.iter().position(|byte| *byte == 0).unwrap();
                String::from_utf8_lossy(&name[..end]).into_owned()
            })
            .collect();
        assert_eq!(names, ["proc", "a", "a/b", "a/b/file", "a/link", "TRAILER!!!"]);
    }
}
