//! A kernel QEMU can start without unpacking it under emulation, and the modules the guest needs.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use super::command;

const XZ_MAGIC: &[u8] = b"\xFD7zXZ\0";

/// The ELF kernel inside a bzImage: booted by its PVH note it saves the guest from running the decompressor,
/// which takes two seconds under TCG.
pub(super) fn vmlinux(bzimage: &[u8], scratch: &Path) -> Result<Vec<u8>> {
    // Documentation/arch/x86/boot.rst: setup_sects at 1F1, "HdrS" at 202, protocol version at 206,
    // payload_offset and payload_length (2.08 and later) at 248 and 24C.
    ensure!(bzimage.get(0x202..0x206) == Some(b"HdrS"), "the kernel is not a bzImage");
    let word = |at: usize| -> Result<usize> {
        let bytes = bzimage.get(at..at + 4).context("the kernel image ends inside its header")?;
        Ok(u32::from_le_bytes(bytes.try_into()?) as usize)
    };
    ensure!(word(0x206)? & 0xFFFF >= 0x208, "the kernel's boot protocol is older than 2.08");
    let sectors = if bzimage[0x1F1] == 0 { 4 } else { usize::from(bzimage[0x1F1]) };
    let start = (sectors + 1) * 512 + word(0x248)?;
    let payload = bzimage.get(start..start + word(0x24C)?).context("the kernel image is cut short")?;
    ensure!(
        payload.starts_with(XZ_MAGIC),
        "the kernel is not compressed with xz but with something that starts {:02X?}",
        &payload[..payload.len().min(6)]
    );
    // The kernel's build appends the unpacked size, which xz would take for a damaged second stream.
    let (stream, size) = payload.split_last_chunk::<4>().context("the kernel's payload is empty")?;
    let kernel = unxz(stream, scratch)?;
    ensure!(
        kernel.len() == u32::from_le_bytes(*size) as usize && kernel.starts_with(b"\x7FELF"),
        "the kernel's payload did not unpack to the ELF file it announces"
    );
    Ok(kernel)
}

fn unxz(bytes: &[u8], scratch: &Path) -> Result<Vec<u8>> {
    let packed = scratch.join("packed.xz");
    fs::write(&packed, bytes)?;
    command::output(Command::new("xz").arg("-dc").arg(packed))
}

/// The named modules and everything they depend on, as (path below /lib/modules/VERSION, content).
/// A name without a file is built in.
pub(super) fn modules(root: &Path, names: &[&str], scratch: &Path) -> Result<BTreeMap<PathBuf, Vec<u8>>> {
    let mut files = BTreeMap::new();
    index(&root.join("kernel"), &mut files)?;
    ensure!(!files.is_empty(), "no kernel modules in {}", root.display());
    let mut wanted: Vec<String> = names.iter().map(|name| canonical(name)).collect();
    let mut seen = BTreeSet::new();
    let mut found = BTreeMap::new();
    while let Some(name) = wanted.pop() {
        let Some(path) = files.get(&name) else { continue };
        if !seen.insert(name) {
            continue;
        }
        let mut bytes = fs::read(path)?;
        let mut below = path.strip_prefix(root)?.to_owned();
        if path.extension() == Some(OsStr::new("xz")) {
            bytes = unxz(&bytes, scratch)?;
            below.set_extension("");
        }
        wanted.extend(dependencies(&bytes)?);
        found.insert(below, bytes);
    }
    Ok(found)
}

fn index(directory: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    for entry in fs::read_dir(directory).with_context(|| directory.display().to_string())? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            index(&entry.path(), files)?;
            continue;
        }
        let name = entry.file_name().to_string_lossy().into_owned();
        if let Some((stem, "ko" | "ko.xz")) = name.split_once('.') {
            files.insert(canonical(stem), entry.path());
        }
    }
    Ok(())
}

/// File names have dashes where modules' own names have underscores.
fn canonical(name: &str) -> String {
    name.replace('-', "_")
}

/// What `depends=` in the module's `.modinfo` section names.
fn dependencies(module: &[u8]) -> Result<Vec<String>> {
    let info = section(module, b".modinfo").context("a kernel module without .modinfo")?;
    let depends = info.split(|byte| *byte == 0).find_map(|field| field.strip_prefix(b"depends="));
    let names = std::str::from_utf8(depends.unwrap_or_default())?;
    Ok(names.split(',').filter(|name| !name.is_empty()).map(canonical).collect())
}

/// The content of a section of a 64-bit little-endian ELF file.
fn section<'a>(elf: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    let number = |at: usize, width: usize| -> Option<usize> {
        let bytes = elf.get(at..at.checked_add(width)?)?;
        Some(bytes.iter().rev().fold(0, |value, byte| value << 8 | usize::from(*byte)))
    };
    // e_shoff, e_shentsize, e_shnum, e_shstrndx; in a section header sh_name, sh_offset, sh_size
    let (table, width, count, names) =
        (number(0x28, 8)?, number(0x3A, 2)?, number(0x3C, 2)?, number(0x3E, 2)?);
    let header = |index: usize| {
        let at = table + index * width;
        let (start, size) = (number(at + 0x18, 8)?, number(at + 0x20, 8)?);
        Some((number(at, 4)?, elf.get(start..start.checked_add(size)?)))
    };
    let strings = header(names)?.1?;
    (0..count).find_map(|index| {
        let (at, content) = header(index)?;
        let text = strings.get(at..)?.split(|byte| *byte == 0).next()?;
        if text == name { content } else { None }
    })
}

/// Drops section headers and what stands behind the last loaded segment of an executable: the debug
/// information of a debug build is nine tenths of it, and the guest would have to unpack it at each boot.
pub(super) fn without_debug_info(mut elf: Vec<u8>) -> Result<Vec<u8>> {
    ensure!(elf.starts_with(b"\x7FELF\x02\x01"), "not a 64-bit little-endian ELF file");
    let number = |at: usize, width: usize| -> Result<usize> {
        let Some(bytes) = elf.get(at..at + width) else { bail!("an ELF file cut short") };
        Ok(bytes.iter().rev().fold(0, |value, byte| value << 8 | usize::from(*byte)))
    };
    // e_phoff, e_phentsize, e_phnum; in a program header p_offset, p_filesz
    let (table, width, count) = (number(0x20, 8)?, number(0x36, 2)?, number(0x38, 2)?);
    let mut end = table + width * count;
    for index in 0..count {
        let at = table + index * width;
        end = end.max(number(at + 0x08, 8)? + number(at + 0x20, 8)?);
    }
    elf.truncate(end);
    // e_shoff, then e_shnum and e_shstrndx
    elf[0x28..0x30].fill(0);
    elf[0x3C..0x40].fill(0);
    Ok(elf)
}
