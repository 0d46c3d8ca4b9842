//! What the guest boots: a kernel and an initramfs, made from Debian packages and kept in cargo's target
//! directory until something they are made of changes.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::BufWriter;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Instant, SystemTime};

use anyhow::{Context, Result, bail, ensure};

use super::cpio::Tree;
use super::packages::{self, Packages};
use super::{command, kernel};

/// What QEMU's `-kernel` and `-initrd` take.
#[derive(Clone, Debug)]
pub struct Image {
    /// An ELF kernel with a PVH note.
    pub kernel: PathBuf,
    /// An uncompressed cpio archive: unpacking it costs less than reading it.
    pub initramfs: PathBuf,
}

const MODULES: [&str; 12] = [
    "usbcore",
    "uhci-hcd",
    "ohci-pci",
    "ehci-pci",
    "xhci-pci",
    "usbmon",
    "qemu_fw_cfg",
    "virtio_pci",
    "virtio_net",
    "virtio_console",
    "usbip-core",
    "vhci-hcd",
];

const LIBRARIES: &str = "/usr/lib/x86_64-linux-gnu";
const CCID_BUNDLE: &str = "/usr/lib/pcsc/drivers/ifd-ccid.bundle/Contents";

/// Programs and loadable libraries of the host, with everything `ldd` says they need.
const HOST_PROGRAMS: [&str; 11] = [
    "/usr/sbin/pcscd",
    "/usr/lib/pcsc/drivers/ifd-ccid.bundle/Contents/Linux/libccid.so",
    "/usr/bin/opensc-tool",
    "/usr/bin/pkcs11-tool",
    "/usr/bin/pkcs15-tool",
    "/usr/bin/piv-tool",
    "/usr/bin/openssl",
    "/usr/lib/x86_64-linux-gnu/opensc-pkcs11.so",
    // The rest is opened at run time, so ldd does not tell of it. libopensc opens libpcsclite and OpenSSL's
    // legacy provider; glibc opens libgcc_s when a thread ends, without it pcscd aborts after its first client.
    "/usr/lib/x86_64-linux-gnu/libpcsclite.so.1",
    "/usr/lib/x86_64-linux-gnu/ossl-modules/legacy.so",
    "/lib/x86_64-linux-gnu/libgcc_s.so.1",
];

/// Our own programs, found beside the running one.
const OWN_PROGRAMS: [&str; 3] = ["guest-agent", "guest-pcsc", "guest-usb"];

const DIRECTORIES: [&str; 8] = ["/proc", "/sys", "/dev", "/run", "/tmp", "/root", "/var", "/etc"];

/// Every input that is compiled in: the guest's files, and the code that makes the image.
const SOURCES: [&str; 6] = [
    include_str!("../../guest/init"),
    include_str!("../../guest/functions.sh"),
    include_str!("image.rs"),
    include_str!("cpio.rs"),
    include_str!("kernel.rs"),
    include_str!("packages.rs"),
];

/// Starts the names of what is being made.
const PARTIAL: &str = ".partial-";

/// Alternating builds (debug, release) each keep theirs.
const KEPT: usize = 4;

impl Image {
    /// Builds what is missing or out of date; costs some 20 ms when nothing is.
    pub fn ensure() -> Result<Self> {
        ensure!(cfg!(target_arch = "x86_64"), "the test guest is made from the host's programs: x86-64 only");
        let own = OwnPrograms::find()?;
        let directory = own.target.join("guest");
        let packages = directory.join("packages");
        fs::create_dir_all(&packages).with_context(|| packages.display().to_string())?;
        let lock = File::create(directory.join("lock")).context("the lock of the guest's image")?;
        // Two test programs may want it at once; the second finds it made.
        rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive)?;

        remove_left_over(&directory)?;
        let packages = Packages::fetch(&packages)?;
        let builder = Builder { directory: &directory, packages: &packages, own: &own };
        let kernel = builder.kernel()?;
        let initramfs = builder.initramfs(&kernel)?;
        Ok(Self { kernel: kernel.join("vmlinux"), initramfs })
    }
}

/// The programs cargo has built for us, and the target directory they are in.
struct OwnPrograms {
    target: PathBuf,
    paths: Vec<PathBuf>,
}

impl OwnPrograms {
    fn find() -> Result<Self> {
        let exe = std::env::current_exe()?;
        // Tests run in DIR/deps, programs in DIR.
        let directory = exe
            .ancestors()
            .skip(1)
            .take(2)
            .find(|directory| OWN_PROGRAMS.iter().all(|name| directory.join(name).exists()))
            .with_context(|| {
                let names = OWN_PROGRAMS.join(" and ");
                format!("{names} not found near {}; `cargo build -p stack-tests --bins`", exe.display())
            })?;
        // Beside the profiles; with `--target` that is the triple's directory.
        let target = directory.parent().context("the programs are in no target directory")?;
        let paths = OWN_PROGRAMS.iter().map(|name| directory.join(name)).collect();
        Ok(Self { target: target.to_owned(), paths })
    }
}

struct Builder<'a> {
    directory: &'a Path,
    packages: &'a Packages,
    own: &'a OwnPrograms,
}

impl Builder<'_> {
    /// A directory with `vmlinux` and the modules we want.
    fn kernel(&self) -> Result<PathBuf> {
        let mut key = DefaultHasher::new();
        (SOURCES, file_name(&self.packages.kernel)).hash(&mut key);
        self.made("kernel", key.finish(), |made| {
            let unpacked = partial(self.directory)?;
            let root = unpacked.path();
            packages::unpack(&self.packages.kernel, root)?;
            let (version, modules) = module_tree(root)?;
            let bzimage = fs::read(root.join(format!("boot/vmlinuz-{version}")))?;
            fs::write(made.join("vmlinux"), kernel::vmlinux(&bzimage, root)?)?;
            let into = made.join("lib/modules").join(&version);
            for (path, bytes) in kernel::modules(&modules, &MODULES, root)? {
                write_below(&into, &path, &bytes)?;
            }
            for name in ["modules.builtin", "modules.order"] {
                fs::copy(modules.join(name), into.join(name)).with_context(|| name.to_owned())?;
            }
            // The host need not have kmod; busybox brings a depmod.
            command::output(Command::new("busybox").args(["depmod", "-b"]).arg(made).arg(&version))?;
            Ok(())
        })
    }

    fn initramfs(&self, kernel: &Path) -> Result<PathBuf> {
        let mut key = DefaultHasher::new();
        (SOURCES, file_name(kernel)).hash(&mut key);
        for package in &self.packages.others {
            file_name(package).hash(&mut key);
        }
        // More than is used, but never less: libraries, plug-ins and configuration come from many packages.
        command::output(Command::new("dpkg-query").args(["-W", "-f", "${Package} ${Version}\n"]))?
            .hash(&mut key);
        for path in &self.own.paths {
            let stat = fs::metadata(path)?;
            (path, stat.len(), stat.mtime(), stat.mtime_nsec()).hash(&mut key);
        }
        let directory = self.made("initramfs", key.finish(), |made| {
            let unpacked = partial(self.directory)?;
            for package in &self.packages.others {
                packages::unpack(package, unpacked.path())?;
            }
            let tree = self.tree(kernel, unpacked.path())?;
            let mut output = BufWriter::new(File::create(made.join("cpio"))?);
            tree.write(&DIRECTORIES, &mut output)?;
            output.into_inner()?;
            Ok(())
        })?;
        Ok(directory.join("cpio"))
    }

    /// `NAME-KEY` in our directory, made by `make` if it is not there. Never half there: it is made under another
    /// name. Older ones of that name are removed, but for some.
    fn made(&self, name: &str, key: u64, make: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
        let path = self.directory.join(format!("{name}-{key:016x}"));
        if path.exists() {
            return Ok(path);
        }
        let start = Instant::now();
        let made = partial(self.directory)?;
        make(made.path()).with_context(|| format!("building the guest's {name}"))?;
        let prefix = format!("{name}-");
        let mut old = Vec::new();
        for entry in fs::read_dir(self.directory)? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with(&prefix) {
                old.push((entry.metadata()?.modified().unwrap_or(SystemTime::UNIX_EPOCH), entry.path()));
            }
        }
        old.sort();
        for (_, path) in old.iter().rev().skip(KEPT - 1) {
            fs::remove_dir_all(path)?;
        }
        // tempfile makes directories for their owner alone.
        fs::set_permissions(made.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        fs::rename(made.keep(), &path)?;
        eprintln!("guest: made {} in {:.1} s", path.display(), start.elapsed().as_secs_f64());
        Ok(path)
    }

    fn tree(&self, kernel: &Path, unpacked: &Path) -> Result<Tree> {
        let mut tree = Tree::default();
        let mut needed = Closure::new(unpacked);

        tree.file(
            "/bin/busybox",
            0o755,
            fs::read("/bin/busybox").context("busybox-static is not installed")?,
        );
        for path in HOST_PROGRAMS {
            add_program(&mut tree, &mut needed, path, Path::new(path))?;
        }
        add_program(&mut tree, &mut needed, "/lib/systemd/systemd-udevd", &unpacked.join("bin/udevadm"))?;
        tree.link("/bin/udevadm", "/lib/systemd/systemd-udevd");
        add_program(&mut tree, &mut needed, "/usr/sbin/usbip", &unpacked.join("usr/sbin/usbip"))?;
        for path in &self.own.paths {
            let bytes = kernel::without_debug_info(fs::read(path)?)?;
            tree.file(&format!("/usr/bin/{}", file_name(path)), 0o755, bytes);
            needed.add(path)?;
        }
        for (name, path) in needed.libraries {
            let directory = if name.starts_with("ld-linux") { "/lib64" } else { "/lib/x86_64-linux-gnu" };
            let inside = format!("{directory}/{name}");
            if !tree.contains(&inside) {
                tree.file(&inside, 0o755, fs::read(path)?);
            }
        }

        for (inside, path) in [
            (format!("{CCID_BUNDLE}/Info.plist"), "/etc/libccid_Info.plist".into()),
            ("/etc/opensc/opensc.conf".to_owned(), "/etc/opensc/opensc.conf".into()),
            ("/usr/lib/ssl/openssl.cnf".to_owned(), "/etc/ssl/openssl.cnf".into()),
            ("/lib/udev/rules.d/92-libccid.rules".to_owned(), "/lib/udev/rules.d/92-libccid.rules".into()),
            (
                "/lib/udev/rules.d/50-udev-default.rules".to_owned(),
                unpacked.join("lib/udev/rules.d/50-udev-default.rules"),
            ),
        ] {
            tree.file(&inside, 0o644, fs::read(&path).with_context(|| path.display().to_string())?);
        }
        tree.file("/etc/passwd", 0o644, "root:x:0:0::/root:/bin/sh\n");
        tree.file("/etc/group", 0o644, "root:x:0:\ntty:x:5:\ndialout:x:20:\nplugdev:x:46:\npcscd:x:101:\n");
        // usbip takes names from it and complains where there is none; nobody reads the names.
        tree.file("/usr/share/misc/usb.ids", 0o644, "");
        tree.file("/init", 0o755, SOURCES[0]);
        tree.file("/lib/functions.sh", 0o644, SOURCES[1]);

        add_directory(&mut tree, "/lib/modules", &kernel.join("lib/modules"))?;
        for name in command::text(Command::new("busybox").arg("--list"))?.lines() {
            let used = |directory: &str| tree.contains(&format!("{directory}/{name}"));
            if !["/bin", "/usr/bin", "/usr/sbin"].iter().any(|directory| used(directory)) {
                tree.link(&format!("/bin/{name}"), "busybox");
            }
        }
        Ok(tree)
    }
}

/// What builders that were killed had begun; we hold the lock, so nobody is at it.
fn remove_left_over(directory: &Path) -> Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(PARTIAL) {
            fs::remove_dir_all(entry.path())?;
        }
    }
    Ok(())
}

fn partial(directory: &Path) -> Result<tempfile::TempDir> {
    Ok(tempfile::Builder::new().prefix(PARTIAL).tempdir_in(directory)?)
}

fn add_program(tree: &mut Tree, needed: &mut Closure, inside: &str, path: &Path) -> Result<()> {
    let bytes = fs::read(path).with_context(|| {
        format!("{} is missing; `cargo xtask setup` installs what is needed", path.display())
    })?;
    tree.file(inside, 0o755, bytes);
    needed.add(path)
}

fn add_directory(tree: &mut Tree, inside: &str, path: &Path) -> Result<()> {
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        let inside = format!("{inside}/{}", entry.file_name().to_string_lossy());
        if entry.file_type()?.is_dir() {
            add_directory(tree, &inside, &entry.path())?;
        } else {
            tree.file(&inside, 0o644, fs::read(entry.path())?);
        }
    }
    Ok(())
}

/// The libraries a set of programs needs, by the name they ask for.
struct Closure {
    search: String,
    libraries: BTreeMap<String, PathBuf>,
}

impl Closure {
    fn new(unpacked: &Path) -> Self {
        // Where unpacked packages have libraries the host may lack.
        let search = [LIBRARIES, "/lib/x86_64-linux-gnu"].map(|path| format!("{}{path}", unpacked.display()));
        Self { search: search.join(":"), libraries: BTreeMap::new() }
    }

    fn add(&mut self, path: &Path) -> Result<()> {
        let listing = command::text(Command::new("ldd").arg(path).env("LD_LIBRARY_PATH", &self.search))?;
        // `NAME => PATH (ADDRESS)`, `LOADER (ADDRESS)`, or the vDSO, which is no file
        for line in listing.lines().map(str::trim) {
            let (name, path) = match line.split_once(" => ") {
                Some((name, "not found")) => bail!("{} needs {name}, which is missing", path.display()),
                Some((name, path)) => (name, path),
                None => (line, line),
            };
            let path = path.split_whitespace().next().unwrap_or_default();
            if path.starts_with('/') {
                let name = name.split_whitespace().next().unwrap_or_default();
                self.libraries.insert(file_name(Path::new(name)), path.into());
            }
        }
        Ok(())
    }
}

/// Version and directory of the only kernel below `root`.
fn module_tree(root: &Path) -> Result<(String, PathBuf)> {
    for modules in ["lib/modules", "usr/lib/modules"] {
        if let Ok(mut entries) = fs::read_dir(root.join(modules)) {
            let entry = entries.next().context("a kernel package without modules")??;
            return Ok((entry.file_name().to_string_lossy().into_owned(), entry.path()));
        }
    }
    bail!("a kernel package without modules")
}

fn write_below(directory: &Path, path: &Path, bytes: &[u8]) -> Result<()> {
    let path = directory.join(path);
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    fs::write(&path, bytes).with_context(|| path.display().to_string())
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}
