//! `--pin-file` and `--password-file`.

use super::*;

#[test]
fn a_secret_file_holds_one_line_for_its_owner_alone() {
    let place = Place::new();
    let path = place.path().join("pin");
    let write = |contents: &[u8], mode| {
        let _ = fs::remove_file(&path);
        fs::write(&path, contents).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        read_secret_file(&path)
    };
    let longest = [b'x'; 1024];
    for (contents, secret) in [
        (&b"1234"[..], &b"1234"[..]),
        (b"1234\n", b"1234"),
        (b"1234\r\n", b"1234"),
        (b" 12 34 \n", b" 12 34 "),
        (&longest, &longest),
    ] {
        assert!(write(contents, 0o600).unwrap().equals(secret));
    }
    assert!(write(b"1234", 0o400).unwrap().equals(b"1234"));
    let too_long = [b'x'; 1025];
    for contents in
        [&b""[..], b"\n", b"\r\n", b"12\n34", b"1234\n\n", b"1234\r", b"12\r34\n", b"12\x0034", &too_long]
    {
        let refused = write(contents, 0o600);
        assert!(matches!(refused, Err(SecretFileError::Contents { .. })), "{contents:?}");
    }
    for mode in [0o640, 0o604, 0o620, 0o602, 0o610, 0o644] {
        let refused = write(b"1234", mode).unwrap_err();
        assert!(matches!(refused, SecretFileError::OpenToOthers { .. }));
        assert!(refused.to_string().contains(&format!("chmod 600 {}", path.display())), "{refused}");
    }
    assert!(matches!(read_secret_file(place.path()), Err(SecretFileError::NotRegular { .. })));
    assert!(matches!(read_secret_file("/dev/null".as_ref()), Err(SecretFileError::NotRegular { .. })));
    fs::remove_file(&path).unwrap();
    assert!(matches!(read_secret_file(&path), Err(SecretFileError::Io { .. })));
    assert!(Command::new("mkfifo").args(["-m", "600"]).arg(&path).status().unwrap().success());
    assert!(matches!(read_secret_file(&path), Err(SecretFileError::NotRegular { .. })));
}

/// Runs a shell script in whose place [`child`] reads the secret named by `file`, and says what it was.
fn read_in_child(script: &str, file: &str, credentials: &str) -> String {
    let place = Place::new();
    let mut command = Command::new("bash");
    command.args(["-c", script]).arg(this()).child("read", &place);
    let output = command.env(CHILD_FILE, file).env("CREDENTIALS_DIRECTORY", credentials).output().unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    let line = said.lines().find(|line| line.starts_with("read ")).map(str::to_owned);
    line.unwrap_or_else(|| panic!("{said}{}", String::from_utf8_lossy(&output.stderr)))
}

#[test]
fn a_secret_can_come_from_an_inherited_descriptor() {
    for (script, file, secret) in [
        ("printf '1234\\n' | \"$0\" \"$@\"", "fd:0", "read 1234"),
        // The writer is later than the reader.
        ("(sleep 0.2; echo 1234) | \"$0\" \"$@\"", "/dev/fd/0", "read 1234"),
        ("exec \"$0\" \"$@\" 63< <(echo 1234)", "fd:63", "read 1234"),
        ("exec \"$0\" \"$@\" 5<<< 1234", "/dev/fd/5", "read 1234"),
        ("exec \"$0\" \"$@\" 5< /dev/null", "fd:5", "read error: fd:5 is not a regular file"),
        ("exec \"$0\" \"$@\" 5< /", "fd:5", "read error: fd:5 is not a regular file"),
        (
            "exec \"$0\" \"$@\" 5< <(head -c 100000 /dev/zero)",
            "fd:5",
            "read error: fd:5 is longer than 1 KiB",
        ),
        ("exec \"$0\" \"$@\" 5< <(true)", "fd:5", "read error: fd:5 is empty"),
    ] {
        assert_eq!(read_in_child(script, file, ""), secret, "{script}");
    }
    let gone = read_in_child("exec \"$0\" \"$@\"", "fd:77", "");
    assert!(gone.starts_with("read error: cannot read fd:77: No such file"), "{gone}");
    for name in
        ["fd:", "fd:x", "fd:+1", "fd:-1", "fd:0/../1", "fd:99999999999", "/dev/fd/", "/dev/fd/../null"]
    {
        assert!(read_secret_file(name.as_ref()).is_err(), "{name}");
    }
}

#[test]
fn a_credential_of_systemd_may_be_readable_by_its_group() {
    let place = Place::new();
    let directory = place.path().join("credentials");
    fs::create_dir(&directory).unwrap();
    let file = directory.join("pin");
    fs::write(&file, "1234\n").unwrap();
    let (file, directory) = (file.to_str().unwrap(), directory.to_str().unwrap());
    let read = |mode, credentials| {
        fs::set_permissions(file, fs::Permissions::from_mode(mode)).unwrap();
        read_in_child("exec \"$0\" \"$@\"", file, credentials)
    };
    assert_eq!(read(0o440, directory), "read 1234");
    assert_eq!(read(0o400, directory), "read 1234");
    for (mode, credentials) in [
        (0o460, directory),
        (0o444, directory),
        (0o440, ""),
        (0o440, "/"),
        (0o440, place.path().to_str().unwrap()),
    ] {
        let refused = read(mode, credentials);
        assert!(refused.starts_with("read error: ") && refused.contains("open to others"), "{refused}");
    }
    // Not a directory at all, so nothing is in it.
    let refused = read_in_child(&format!("cd '{directory}'; exec \"$0\" \"$@\""), "pin", "");
    assert!(refused.contains("open to others"), "{refused}");
}
