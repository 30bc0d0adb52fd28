@echo off
chcp 65001 >nul
set PYTHONUTF8=1
cd /d {root}
echo %DATE% %TIME% start >> {log}
{words} >> {log} 2>&1
set CODE=%ERRORLEVEL%
echo %DATE% %TIME% exit code %CODE% >> {log}
exit /b %CODE%
