//! probe
#![forbid(unsafe_code)]
use stack_tests::{database::*, guest::*, passthru::*};
#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let t = std::time::Instant::now();
    let s = Stack::start(Road::Unix, &[]).await?;
    println!("{:?}\n{}", t.elapsed(), s.client.log());
    for c in ["guest-pcsc readers".to_owned(), "guest-pcsc status".to_owned(), "pkcs11-tool -L".to_owned(), format!("pkcs11-tool -O --login --pin {PIN}"),
      "echo hello >/tmp/m; pkcs11-tool --sign --mechanism SHA256-RSA-PKCS --login --pin 271828 --id 0001 -i /tmp/m -o /tmp/s; ls -l /tmp/s".to_owned()] {
        let t = std::time::Instant::now();
        println!("## {c}\n{}{:?}", s.guest.ok(&c).await?, t.elapsed());
    }
    println!("{}", std::fs::read_to_string(format!("/proc/{}/cmdline", s.guest.pid()))?.replace('\0', " "));
    Ok(())
}
