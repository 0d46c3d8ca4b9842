//! Builds the test guest's image, or finds that it is up to date, and prints where it is.

#![forbid(unsafe_code)]

use stack_tests::guest::Image;

fn main() -> anyhow::Result<()> {
    let image = Image::ensure()?;
    println!("kernel    {}\ninitramfs {}", image.kernel.display(), image.initramfs.display());
    Ok(())
}
